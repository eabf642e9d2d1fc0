"""The operations in torch, for hosts with no compiler and for float64: short rather than fast."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import KVLayer
from ..metadata import AttentionMetadata, HeadLayout


def paged_attention(
    q: Tensor,
    cache: KVLayer,
    meta: AttentionMetadata,
    heads: HeadLayout,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    """A row at a time, each over its own gathered keys, so that no row depends on another."""
    out = torch.empty(q.shape, dtype=q.dtype)
    kv_of_q = torch.repeat_interleave(torch.arange(heads.num_kv_heads), torch.tensor(heads.q_per_kv))
    wide = torch.promote_types(q.dtype, torch.float32)
    end = 0
    for row, (query_len, context_len) in enumerate(
        zip(meta.query_lens_host.tolist(), meta.context_lens_host.tolist(), strict=True)
    ):
        begin, end = end, end + query_len
        first = 0 if window is None else max(0, context_len - query_len + 1 - window)
        position = torch.arange(first, context_len)
        block, offset = meta.block_tables[row].long()[position // meta.block_size], position % meta.block_size
        keys, values = (  # [Hq, positions, D]
            _widened(rows[block, :, offset], None if scales is None else scales[block, :, offset], wide)
            .transpose(0, 1)
            .index_select(0, kv_of_q)
            for rows, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
        )
        logits = torch.baddbmm(
            torch.zeros((), dtype=wide), q[begin:end].to(wide).transpose(0, 1), keys.mT, alpha=scale
        )
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        query_position = torch.arange(context_len - query_len, context_len)[:, None]
        hidden = position > query_position
        if window is not None:
            hidden |= position <= query_position - window
        logits.masked_fill_(hidden, float("-inf"))
        total = torch.logsumexp(logits, dim=-1)  # [Hq, queries]
        if sinks is not None:
            total = torch.logaddexp(total, sinks.to(wide)[:, None])
        out[begin:end] = (torch.exp(logits - total[..., None]) @ values).transpose(0, 1)
        if lse is not None:
            lse[begin:end] = total.T
    return out


def _widened(rows: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return rows.to(dtype)
    if rows.dtype == torch.uint8:
        rows = torch.cat([rows & 15, rows >> 4], dim=-1).to(dtype) - 7.5
    return rows.to(dtype) * scale.to(dtype)[..., None]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[1],), weight, eps).contiguous()


def rotary_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    cache: KVLayer,
    slot_mapping: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> None:
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos_sin.index_select(0, positions).to(wide).unsqueeze(1).chunk(2, dim=-1)
    half = cos.shape[-1]
    turned = []
    for heads, norm in ((q, q_norm), (k, k_norm)):
        x = heads.to(wide)
        if norm is not None:
            x = F.rms_norm(x, x.shape[-1:], norm.to(wide), eps)
        first, second, rest = x.tensor_split([half, 2 * half], dim=-1)
        x = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
        turned.append(_mixed(x) if cache.format == "int4" else x)
    q.copy_(turned[0])
    stored = slot_mapping >= 0
    slots = slot_mapping[stored]
    block, offset = slots // cache.block_size, slots % cache.block_size
    for x, rows, scales in ((turned[1], cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        if scales is None:
            rows[block, :, offset] = x[stored].to(rows.dtype)
        else:
            codes, scale = _quantised(x[stored].float(), rows.dtype)
            # An index can be stored through bytes only: torch has no indexed store of float8.
            rows.view(torch.uint8)[block, :, offset] = codes.view(torch.uint8)
            scales[block, :, offset] = scale


def _mixed(x: Tensor) -> Tensor:
    """x [T, H, D] times the matrix of `ops.rotary_kv_write`."""
    half = x.shape[-1] // 2
    run = half & -half
    for distance in (half, *(1 << power for power in range(run.bit_length() - 1))):
        first, second = x.unflatten(-1, (-1, 2, distance)).unbind(-2)
        x = torch.stack([first + second, first - second], dim=-2).flatten(-3)
    return x * (1 / math.sqrt(2 * run))


def _quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales as `ops.rotary_kv_write` defines them."""
    if x.shape[0] == 0:
        width = x.shape[-1] // 2 if dtype == torch.uint8 else x.shape[-1]
        return torch.empty((*x.shape[:-1], width), dtype=dtype), torch.empty(
            x.shape[:-1], dtype=torch.float16
        )
    low, high = x.amin(-1), x.amax(-1)
    divisor = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.uint8: 7.5}[dtype]
    scale = (torch.maximum(high, -low) / divisor + (x * 0).sum(-1)).half()
    codes = torch.nan_to_num(x / scale.float()[..., None], nan=0.0, posinf=0.0, neginf=0.0)
    if dtype == torch.float8_e4m3fn:
        return codes.clamp_(-448, 448).to(dtype), scale
    if dtype == torch.int8:
        return codes.round_().clamp_(-127, 127).to(dtype), scale
    low_half, high_half = (codes.floor_().clamp_(-8, 7) + 8).to(torch.uint8).chunk(2, dim=-1)
    return low_half | high_half << 4, scale


def gated(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return gate.mul_(up).to(gate_up.dtype)

"""The definition of every operation in `ops`, in plain torch, written to be read.

No code is shared with the back ends. Arithmetic is float64 and results are rounded once to the dtype of the input,
so float64 tensors in give float64 results out. Shapes and dtypes are those of `ops`.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .cache import SCALE_DTYPE, KVLayer
from .metadata import AttentionMetadata, HeadLayout


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight."""
    wide = x.double()
    mean_square = (wide * wide).sum(-1, keepdim=True) / x.shape[-1]
    return (wide / torch.sqrt(mean_square + eps) * weight.double()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, rounded to its dtype; then rms_norm(residual)."""
    residual.copy_((residual.double() + x.double()).to(residual.dtype))
    return rms_norm(residual, weight, eps)


def all_reduce_add_rms_norm(xs: Sequence[Tensor], residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += the sum of all ranks' x, rounded to its dtype once; then rms_norm(residual). xs: by rank."""
    total = residual.double()
    for x in xs:
        total = total + x.double()
    residual.copy_(total.to(residual.dtype))
    return rms_norm(residual, weight, eps)


def quantised_linear(
    x: Tensor, codes: Tensor, scales: Tensor, minima: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """x W^T + bias, where W [N, K] is codes * scales + minima, rounded to the dtype of x; see `weight_codes`.

    codes: int8 [N, K], or uint8 [N, K / 2]; scales, minima: [N, K / 32].
    """
    num_rows, groups = scales.shape
    w = torch.zeros(num_rows, groups, 32, dtype=torch.float64)
    for row, group, channel in itertools.product(range(num_rows), range(groups), range(32)):
        if codes.dtype == torch.int8:
            code = int(codes[row, 32 * group + channel])
        else:
            byte = int(codes[row, 16 * group + channel % 16])
            code = byte % 16 if channel < 16 else byte // 16
            code = code - 8 if minima is None else code
        least = 0.0 if minima is None else float(minima[row, group])
        w[row, group, channel] = code * float(scales[row, group]) + least
    y = x.double() @ w.float().to(x.dtype).double().view(num_rows, groups * 32).T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def rotary_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    cache: KVLayer,
    slot_mapping: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Token by token: norm, turn, write back, store."""
    for token, (position, slot) in enumerate(zip(positions.tolist(), slot_mapping.tolist(), strict=True)):
        query, key = q[token].double(), k[token].double()
        if q_norm is not None and k_norm is not None:
            query, key = rms_norm(query, q_norm, eps), rms_norm(key, k_norm, eps)
        query, key = turned(query, cos_sin[position]), turned(key, cos_sin[position])
        if cache.format == "int4":
            query, key = mixed(query), mixed(key)
        q[token] = query.to(q.dtype)
        if slot >= 0:
            block, offset = divmod(slot, cache.block_size)
            store(cache, block, offset, key, v[token])


def turned(heads: Tensor, cos_sin: Tensor) -> Tensor:
    """Pairs (c, c + rotary_dim / 2) of each head turn by their angle. heads [H, D] -> [H, D] float64."""
    cos, sin = cos_sin.double().chunk(2)
    first, second, rest = heads.double().tensor_split([len(cos), 2 * len(cos)], dim=1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=1)


def mixed(heads: Tensor) -> Tensor:
    """Heads times the matrix of `ops.rotary_kv_write`. heads [H, D] -> [H, D] float64."""
    half = heads.shape[1] // 2
    run = half & -half
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < run:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    first, second = heads.double().chunk(2, dim=1)
    runs: Tensor = torch.cat([first + second, first - second], dim=1).unflatten(1, (-1, run))
    return (runs @ matrix).flatten(1) / math.sqrt(2 * run)


def store(cache: KVLayer, block: int, offset: int, key: Tensor, value: Tensor) -> None:
    """One token's keys and values [Hk, D] into one slot."""
    if cache.k_scale is None or cache.v_scale is None:
        cache.k[block, :, offset], cache.v[block, :, offset] = key.to(cache.k.dtype), value.to(cache.v.dtype)
    else:
        cache.k[block, :, offset], cache.k_scale[block, :, offset] = quantised(key, cache.k.dtype)
        cache.v[block, :, offset], cache.v_scale[block, :, offset] = quantised(value, cache.v.dtype)


def quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [..., W] of `dtype` and scales [...] float16 of x [..., D]; in float32, which the definition is in."""
    x = x.float()
    low, high = x.amin(-1), x.amax(-1)
    largest = torch.maximum(high, -low)
    broken = (x * 0).sum(-1)  # NaN where there is a NaN or infinity, else 0
    match dtype:
        case torch.int8:
            scale = largest / 127
        case torch.float8_e4m3fn:
            scale = largest / 448
        case torch.uint8:
            scale = largest / 7.5
        case _:
            raise AssertionError(f"no cache format has {dtype}")
    scale = (scale + broken).to(SCALE_DTYPE)
    # 0 / 0 and what a broken row holds become 0.
    codes = torch.nan_to_num(x / scale.float()[..., None], nan=0.0, posinf=0.0, neginf=0.0)
    match dtype:
        case torch.int8:
            return codes.round().clamp(-127, 127).to(torch.int8), scale
        case torch.float8_e4m3fn:
            return codes.clamp(-448, 448).to(torch.float8_e4m3fn), scale
    low_half, high_half = (codes.floor().clamp(-8, 7) + 8).to(torch.uint8).chunk(2, dim=-1)
    return low_half | high_half << 4, scale


def dequantised(rows: Tensor, scale: Tensor | None) -> Tensor:
    """The float64 values [..., D] of stored rows [..., W] and their scales [...]."""
    if scale is None:
        return rows.double()
    if rows.dtype == torch.uint8:
        rows = torch.cat([rows & 15, rows >> 4], dim=-1).double() - 7.5
    return rows.double() * scale.double()[..., None]


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate / (1 + exp(-gate)) * up."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """gate / 2 * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 gate^3))) * up."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return (gate / 2 * (1 + torch.tanh(inner)) * up).to(gate_up.dtype)


def paged_attention(
    q: Tensor,
    cache: KVLayer,
    meta: AttentionMetadata,
    heads: HeadLayout,
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q . k) v over the visible positions, one row and one KV head at a time."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    starts = meta.query_start.tolist()
    for row, context_len in enumerate(meta.context_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        position = torch.arange(context_len)
        block, offset = meta.block_tables[row].long()[position // meta.block_size], position % meta.block_size
        keys, values = (  # [context, Hk, D]
            dequantised(rows[block, :, offset], None if scales is None else scales[block, :, offset])
            for rows, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
        )
        query_position = torch.arange(context_len - (end - begin), context_len)
        hidden = position[None, :] > query_position[:, None]
        if window is not None:
            hidden |= position[None, :] <= query_position[:, None] - window
        first = 0
        for kv_head, count in enumerate(heads.q_per_kv):
            group = slice(first, first + count)
            first += count
            logits = scale * torch.einsum("qhd,kd->qhk", q[begin:end, group].double(), keys[:, kv_head])
            if soft_cap is not None:
                logits = soft_cap * torch.tanh(logits / soft_cap)
            logits = logits.masked_fill(hidden[:, None, :], float("-inf"))
            total = torch.logsumexp(logits, dim=-1)
            if sinks is not None:
                total = torch.logaddexp(total, sinks[group].double())
            weights = torch.exp(logits - total[..., None])
            # Values that nobody sees are left out: 0 times NaN would be NaN.
            seen = values[:, kv_head].masked_fill(hidden.all(0)[:, None], 0.0)
            out[begin:end, group] = torch.einsum("qhk,kd->qhd", weights, seen).to(q.dtype)
            if lse is not None:
                lse[begin:end, group] = total.float()
    return out

"""The definition of every operation in `ops`, in plain torch, written to be read.

No code is shared with the back ends. Arithmetic is float64 and results are rounded once to the dtype of the input,
so float64 tensors in give float64 results out. Shapes and dtypes are those of `ops`.
"""

import torch
from torch import Tensor

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


def rotary(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
    """Pairs (c, c + rotary_dim / 2) of each head turn by the angle of the token's position, in place."""
    half = cos_sin.shape[1] // 2
    for token, position in enumerate(positions.tolist()):
        cos = cos_sin[position, :half].double()
        sin = cos_sin[position, half:].double()
        for heads in (q, k):
            before = heads[token].to(torch.float64, copy=True)
            first, second = before[:, :half], before[:, half : 2 * half]
            heads[token, :, :half] = (first * cos - second * sin).to(heads.dtype)
            heads[token, :, half : 2 * half] = (second * cos + first * sin).to(heads.dtype)


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """cache[slot // block_size, :, slot % block_size] = token's keys or values, unless the slot is -1."""
    block_size = k_cache.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            k_cache[slot // block_size, :, slot % block_size] = k[token]
            v_cache[slot // block_size, :, slot % block_size] = v[token]


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate / (1 + exp(-gate)) * up."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    heads: HeadLayout,
    scale: float,
    *,
    window: int | None = None,
) -> Tensor:
    """softmax(scale * q . k) v over the visible positions, one row and one KV head at a time."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    block_size = k_cache.shape[2]
    starts = meta.query_start.tolist()
    for row, context_len in enumerate(meta.context_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        position = torch.arange(context_len)
        block = meta.block_tables[row].long()[position // block_size]
        keys = k_cache[block, :, position % block_size].double()  # [context, Hk, D]
        values = v_cache[block, :, position % block_size].double()
        query_position = torch.arange(context_len - (end - begin), context_len)
        hidden = position[None, :] > query_position[:, None]
        if window is not None:
            hidden |= position[None, :] <= query_position[:, None] - window
        first = 0
        for kv_head, count in enumerate(heads.q_per_kv):
            queries = q[begin:end, first : first + count].double()
            logits = scale * torch.einsum("qhd,kd->qhk", queries, keys[:, kv_head])
            weights = torch.softmax(logits.masked_fill(hidden[:, None, :], float("-inf")), dim=-1)
            attended = torch.einsum("qhk,kd->qhd", weights, values[:, kv_head])
            out[begin:end, first : first + count] = attended.to(q.dtype)
            first += count
    return out

"""All that lies between the qkv product and attention: QK norm, rotary and cache write in one pass.

A program per token and block of local KV heads turns and stores their keys, stores their values, and turns its share
of the token's query heads. Shares are even and do not follow the KV groups: any program may turn any query head.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from ..cache import KVLayer
from ..tiles import rotary_tile
from .codes import encoded, raw, scale_of
from .heads import mix_queries, turn_queries, turned_halves


@triton.jit
def _store(
    low,
    high,
    rows_ptr,
    scales_ptr,
    row,
    is_head,
    HEAD_DIM: tl.constexpr,
    FORMAT: tl.constexpr,
    LANES: tl.constexpr,
):
    """Writes rows [H, 1] of the cache from the lower and upper halves [H, LANES] of their channels."""
    half: tl.constexpr = (HEAD_DIM + 1) // 2
    lane = tl.arange(0, LANES)[None, :]
    if FORMAT != "auto":
        scale = scale_of(low, high, FORMAT)[:, None]
        tl.store(scales_ptr + row, scale, mask=is_head)
        low = encoded(low, scale, FORMAT)
        high = encoded(high, scale, FORMAT)
    if FORMAT == "int4":
        tl.store(rows_ptr + row * half + lane, low | (high << 4), mask=is_head & (lane < half))
    else:
        dtype = rows_ptr.dtype.element_ty
        place = rows_ptr + row * HEAD_DIM + lane
        tl.store(place, low.to(dtype), mask=is_head & (lane < half))
        tl.store(place + half, high.to(dtype), mask=is_head & (lane < HEAD_DIM - half))


@triton.jit
def rotary_kv_write_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_sin_ptr,
    positions_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    slot_mapping_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    num_q_heads,
    num_kv_heads,
    q_share,
    block_size,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    ROTARY_LANES: tl.constexpr,
    MIX_STEPS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
):
    """Grid: (tokens, blocks of KV_HEADS KV heads, each with q_share query heads). Formulas: see `ops`."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    angles_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * ROTARY_HALF)

    place = tl.arange(0, Q_HEADS)[:, None]
    q_head = tl.program_id(1).to(tl.int64) * q_share + place
    heads_ptr = q_ptr + token * q_stride + q_head * q_head_stride
    is_q_head = (place < q_share) & (q_head < num_q_heads)
    # Lower and upper half of the channels: int4 puts one of each into a byte.
    LANES: tl.constexpr = CHANNELS // 2
    if FORMAT == "int4":
        mix_queries(
            heads_ptr,
            is_q_head,
            angles_ptr,
            q_norm_ptr,
            eps,
            HEAD_DIM,
            ROTARY_HALF,
            MIX_STEPS,
            Q_HEADS,
            LANES,
        )
    else:
        turn_queries(
            heads_ptr,
            is_q_head,
            angles_ptr,
            q_norm_ptr,
            eps,
            HEAD_DIM,
            CHANNELS,
            ROTARY_HALF,
            ROTARY_LANES,
        )
    if slot >= 0:
        half: tl.constexpr = (HEAD_DIM + 1) // 2
        lane = tl.arange(0, LANES)[None, :]
        head = tl.program_id(1).to(tl.int64) * KV_HEADS + tl.arange(0, KV_HEADS)[:, None]
        is_head = head < num_kv_heads
        row = ((slot // block_size) * num_kv_heads + head) * block_size + slot % block_size

        low, high = turned_halves(
            k_ptr + token * k_stride + head * k_head_stride,
            is_head,
            angles_ptr,
            k_norm_ptr,
            eps,
            HEAD_DIM,
            ROTARY_HALF,
            MIX_STEPS,
            KV_HEADS,
            LANES,
        )
        _store(low, high, k_cache_ptr, k_scale_ptr, row, is_head, HEAD_DIM, FORMAT, LANES)

        values_ptr = v_ptr + token * v_stride + head * v_head_stride
        low = tl.load(values_ptr + lane, mask=is_head & (lane < half), other=0.0).to(tl.float32)
        is_high = is_head & (lane < HEAD_DIM - half)
        high = tl.load(values_ptr + lane + half, mask=is_high, other=0.0).to(tl.float32)
        _store(low, high, v_cache_ptr, v_scale_ptr, row, is_head, HEAD_DIM, FORMAT, LANES)


def rotary_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    cache: KVLayer,
    slot_mapping: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """See `ops.rotary_kv_write`."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    half, rotary_half = head_dim // 2, cos_sin.shape[1] // 2
    channels = max(triton.next_power_of_2(head_dim), 2)
    kv_heads = rotary_tile(num_kv_heads, channels)
    blocks = triton.cdiv(num_kv_heads, kv_heads)
    q_share = triton.cdiv(num_q_heads, blocks)
    k_rows, v_rows = raw(cache)
    rotary_kv_write_kernel[(num_tokens, blocks)](
        q,
        k,
        v,
        cos_sin,
        positions,
        k_rows,
        v_rows,
        cache.k_scale,
        cache.v_scale,
        slot_mapping,
        q_norm,
        k_norm,
        eps,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        num_q_heads,
        num_kv_heads,
        q_share,
        cache.block_size,
        FORMAT=cache.format,
        HEAD_DIM=head_dim,
        CHANNELS=channels,
        ROTARY_HALF=rotary_half,
        ROTARY_LANES=max(triton.next_power_of_2(rotary_half), 1),
        MIX_STEPS=(half & -half).bit_length() - 1 if cache.format == "int4" else None,
        Q_HEADS=triton.next_power_of_2(q_share),
        KV_HEADS=kv_heads,
        num_warps=8 if cache.format == "int4" else 4,  # with 4, mixing 128 channels spills on sm_90
    )

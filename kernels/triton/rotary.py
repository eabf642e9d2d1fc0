"""Rotary position embedding in place: one program per token turns all its query and key heads."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(heads_ptr, num_heads, head_stride, cos, sin, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """a' = a cos - b sin, b' = b cos + a sin for the pairs (c, c + half) of every head of a token."""
    head = tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, HALF)[None, :]
    inside = (head < num_heads) & (channel < half)
    first_ptr = heads_ptr + head * head_stride + channel
    second_ptr = first_ptr + half
    first = tl.load(first_ptr, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(second_ptr, mask=inside, other=0.0).to(tl.float32)
    dtype = heads_ptr.dtype.element_ty
    tl.store(first_ptr, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(second_ptr, (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit
def rotary_kernel(
    q_ptr,
    k_ptr,
    cos_sin_ptr,
    positions_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    num_q_heads,
    num_kv_heads,
    half,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Reads the token's row of angles once and turns q, then k. Formula: see `ops.rotary`."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    channel = tl.arange(0, HALF)
    angles_ptr = cos_sin_ptr + position * (2 * half) + channel
    cos = tl.load(angles_ptr, mask=channel < half, other=0.0)[None, :]
    sin = tl.load(angles_ptr + half, mask=channel < half, other=0.0)[None, :]
    _turn(q_ptr + token * q_stride, num_q_heads, q_head_stride, cos, sin, half, Q_HEADS, HALF)
    _turn(k_ptr + token * k_stride, num_kv_heads, k_head_stride, cos, sin, half, KV_HEADS, HALF)


def rotary(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
    """See `ops.rotary`."""
    num_tokens, num_q_heads, _ = q.shape
    num_kv_heads = k.shape[1]
    half = cos_sin.shape[1] // 2
    rotary_kernel[(num_tokens,)](
        q,
        k,
        cos_sin,
        positions,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        num_q_heads,
        num_kv_heads,
        half,
        Q_HEADS=triton.next_power_of_2(num_q_heads),
        KV_HEADS=triton.next_power_of_2(num_kv_heads),
        HALF=triton.next_power_of_2(half),
        num_warps=4,
    )

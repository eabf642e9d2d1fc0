"""Heads of q and k on their way to attention, inside a kernel: QK norm, rotary, and the mixing of channels for int4.

Formulas: see `ops.rotary_kv_write`.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _norm_factor(heads_ptr, is_head, eps, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of some heads: pointers [H, 1] -> [H, 1]."""
    channel = tl.arange(0, CHANNELS)[None, :]
    x = tl.load(heads_ptr + channel, mask=is_head & (channel < HEAD_DIM), other=0.0).to(tl.float32)
    return (1.0 / tl.sqrt(tl.sum(x * x, 1) / HEAD_DIM + eps))[:, None]


@triton.jit
def _normed(heads_ptr, channel, inside, factor, norm_ptr):
    """Some channels of some heads as float32, and if there is a norm, times their factor and weight."""
    x = tl.load(heads_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        x = x * factor * tl.load(norm_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def turn_queries(
    heads_ptr,
    is_head,
    angles_ptr,
    norm_ptr,
    eps,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    LANES: tl.constexpr,
):
    """In place: a thread holds both channels of its pairs before it writes either, and nobody else needs them."""
    dtype = heads_ptr.dtype.element_ty
    factor = 1.0
    if norm_ptr is not None:
        factor = _norm_factor(heads_ptr, is_head, eps, HEAD_DIM, CHANNELS)
        if 2 * ROTARY_HALF < HEAD_DIM:
            channel = 2 * ROTARY_HALF + tl.arange(0, CHANNELS)[None, :]
            inside = is_head & (channel < HEAD_DIM)
            rest = _normed(heads_ptr, channel, inside, factor, norm_ptr)
            tl.store(heads_ptr + channel, rest.to(dtype), mask=inside)
    channel = tl.arange(0, LANES)[None, :]
    turns = channel < ROTARY_HALF
    inside = is_head & turns
    cos = tl.load(angles_ptr + channel, mask=turns, other=0.0)
    sin = tl.load(angles_ptr + ROTARY_HALF + channel, mask=turns, other=0.0)
    first = _normed(heads_ptr, channel, inside, factor, norm_ptr)
    second = _normed(heads_ptr, channel + ROTARY_HALF, inside, factor, norm_ptr)
    tl.store(heads_ptr + channel, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(heads_ptr + channel + ROTARY_HALF, (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit
def _turned(heads_ptr, channel, inside, factor, norm_ptr, angles_ptr, ROTARY_HALF: tl.constexpr):
    """These channels of some heads after turning; each meets the other channel of its pair."""
    is_first = channel < ROTARY_HALF
    turns = inside & (channel < 2 * ROTARY_HALF)
    other = tl.where(is_first, channel + ROTARY_HALF, channel - ROTARY_HALF)
    angle_ptr = angles_ptr + tl.where(is_first, channel, other)
    cos = tl.load(angle_ptr, mask=turns, other=1.0)
    sin = tl.load(angle_ptr + ROTARY_HALF, mask=turns, other=0.0)
    x = _normed(heads_ptr, channel, inside, factor, norm_ptr)
    y = _normed(heads_ptr, other, turns, factor, norm_ptr)
    return x * cos + tl.where(is_first, -y, y) * sin


@triton.jit
def _met(x, DISTANCE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Lanes a and b of x [ROWS, LANES] at this distance, a power of two, as a + b and a - b."""
    lane = tl.arange(0, LANES)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    other = tl.gather(x, lane ^ DISTANCE, 1)
    return other + tl.where((lane & DISTANCE) != 0, -x, x)


@triton.jit
def turned_halves(
    heads_ptr,
    is_head,
    angles_ptr,
    norm_ptr,
    eps,
    HEAD_DIM: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    MIX_STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Lower and upper half of the channels of some heads, [ROWS, LANES] each, normed, turned and, for int4, mixed."""
    half: tl.constexpr = (HEAD_DIM + 1) // 2
    lane = tl.arange(0, LANES)[None, :]
    factor = 1.0
    if norm_ptr is not None:
        factor = _norm_factor(heads_ptr, is_head, eps, HEAD_DIM, 2 * LANES)
    inside = is_head & (lane < half)
    low = _turned(heads_ptr, lane, inside, factor, norm_ptr, angles_ptr, ROTARY_HALF)
    inside = is_head & (lane < HEAD_DIM - half)
    high = _turned(heads_ptr, lane + half, inside, factor, norm_ptr, angles_ptr, ROTARY_HALF)
    if MIX_STEPS is not None:
        FACTOR: tl.constexpr = (2 << MIX_STEPS) ** -0.5
        low, high = (low + high) * FACTOR, (low - high) * FACTOR
        for power in tl.static_range(MIX_STEPS):
            low = _met(low, 1 << power, ROWS, LANES)
            high = _met(high, 1 << power, ROWS, LANES)
    return low, high


@triton.jit
def mix_queries(
    heads_ptr,
    is_head,
    angles_ptr,
    norm_ptr,
    eps,
    HEAD_DIM: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    MIX_STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """In place: all of a program's heads are read before any is written."""
    low, high = turned_halves(
        heads_ptr, is_head, angles_ptr, norm_ptr, eps, HEAD_DIM, ROTARY_HALF, MIX_STEPS, ROWS, LANES
    )
    tl.debug_barrier()
    lane = tl.arange(0, LANES)[None, :]
    dtype = heads_ptr.dtype.element_ty
    inside = is_head & (lane < HEAD_DIM // 2)
    tl.store(heads_ptr + lane, low.to(dtype), mask=inside)
    tl.store(heads_ptr + HEAD_DIM // 2 + lane, high.to(dtype), mask=inside)

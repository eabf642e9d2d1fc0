"""Keys and values as codes of the quantised cache formats, and back, inside kernels. Formulas: see `ops`.

e4m3 is encoded and decoded with integer operations: Triton has no such type below sm_89, and its interpreter rounds
it wrongly. So the kernels see an fp8 cache as bytes.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cache import KVLayer

INFINITY = tl.constexpr(float("inf"))
# A float32 below 2**22 plus this has no bits left for a fraction: the sum rounds it to nearest even.
ROUND_TO_INTEGER = tl.constexpr(1.5 * 2.0**23)
# The smallest normal number of e4m3; below it codes are multiples of 2**-9, the last place of 2**14 in float32.
E4M3_NORMAL = tl.constexpr(2.0**-6)
ROUND_TO_E4M3_STEP = tl.constexpr(2.0**14)


def raw(cache: KVLayer) -> tuple[Tensor, Tensor]:
    """k and v of the cache with a dtype that every kernel can load."""
    if cache.format == "fp8":
        return cache.k.view(torch.uint8), cache.v.view(torch.uint8)
    return cache.k, cache.v


@triton.jit
def scale_of(low, high, FORMAT: tl.constexpr):
    """The float16 scales [H] of rows whose channels are low and high [H, C] float32, padded with 0. NaN for a row that
    has one or an infinity: tl.max passes over NaN, a sum does not.
    """
    largest = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1)
    LIMIT: tl.constexpr = 127.0 if FORMAT == "int8" else 448.0 if FORMAT == "fp8" else 7.5
    scale = tl.div_rn(largest, LIMIT)
    return (scale + tl.sum(low * 0.0 + high * 0.0, 1)).to(tl.float16)


@triton.jit
def encoded(x, scale, FORMAT: tl.constexpr):
    """The codes of float32 x: int8, e4m3 in uint8, or for int4 0 to 15 in uint8. div_rn is true division, `/` is not."""
    x = tl.div_rn(x, scale.to(tl.float32))
    x = tl.where(tl.abs(x) < INFINITY, x, 0.0)  # 0 / 0, and what a broken row holds
    if FORMAT == "int8":
        x = tl.minimum(tl.maximum(x, -127.0), 127.0)
        return ((x + ROUND_TO_INTEGER) - ROUND_TO_INTEGER).to(tl.int8)
    elif FORMAT == "int4":
        return (tl.minimum(tl.maximum(tl.floor(x), -8.0), 7.0) + 8.0).to(tl.uint8)
    else:
        size = tl.minimum(tl.abs(x), 448.0)
        bits = size.to(tl.int32, bitcast=True)
        # Normal: the upper 3 bits of the fraction, rounded to nearest even, and the exponent with a bias of 7.
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
        tiny = (size + ROUND_TO_E4M3_STEP).to(tl.int32, bitcast=True) & 0xF
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        return (tl.where(size < E4M3_NORMAL, tiny, normal) | sign).to(tl.uint8)


@triton.jit
def decoded(codes, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Codes as numbers of DTYPE, each of them exact; those of fp8 are 2**8 times too small, those of int4 16 times too
    large. An int4 code is the upper half of a byte, the lower half 0.
    """
    if FORMAT == "int4":
        return (codes ^ 0x88).to(tl.int8, bitcast=True).to(DTYPE)  # 16 * (half - 7.5), without a subtraction
    elif FORMAT == "fp8":
        # Exponent and fraction go where a float16 has them, whose exponents are 8 smaller; subnormal numbers follow
        # suit. The sign fills the upper 9 of 16 bits and moves to bits 14 and 15, of which only 15 is kept.
        bits = (codes.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4001
        return bits.to(tl.float16, bitcast=True).to(tl.float32).to(DTYPE)
    else:
        return codes.to(DTYPE)

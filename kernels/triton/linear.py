"""Products with a weight kept as codes: they become numbers of x's dtype in the loop, so that only codes are read."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import linear_tile
from ..weight_codes import WeightCodes

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
GROUP = tl.constexpr(32)


@triton.jit
def quantised_linear_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    minima_ptr,
    bias_ptr,
    out_ptr,
    num_tokens,
    num_rows,
    groups,
    x_stride,
    BITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile [BLOCK_T, BLOCK_N] of x W^T + bias, from GROUPS groups of channels a trip.

    A byte has one code, or channels i and 16 + i of a group: then the lower and the upper codes are two tiles, which meet
    their own channels of x.
    """
    PARTS: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = GROUP // PARTS  # bytes of a group
    CHANNELS: tl.constexpr = GROUPS * WIDTH
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, CHANNELS)
    group_of_byte = byte // WIDTH
    channel_of_byte = group_of_byte * GROUP + byte % WIDTH
    token_inside, row_inside = token < num_tokens, row < num_rows
    x_rows = x_ptr + token.to(tl.int64)[:, None] * x_stride
    sums = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for first in range(0, groups, GROUPS):
        inside = first + group_of_byte < groups
        both = inside[:, None] & row_inside[None, :]
        at = row[None, :] * groups + first + group_of_byte[:, None]
        codes = tl.load(
            codes_ptr + row[None, :] * groups * WIDTH + first * WIDTH + byte[:, None], mask=both, other=0
        )
        scales = tl.load(scales_ptr + at, mask=both, other=0.0).to(tl.float32)
        for part in tl.static_range(PARTS):
            if BITS == 8:
                numbers = codes.to(tl.float32)
            else:
                numbers = ((codes >> (4 * part)) & 15).to(tl.float32)
            if minima_ptr is None:
                numbers = (numbers - (0.0 if BITS == 8 else 8.0)) * scales
            else:
                numbers = numbers * scales + tl.load(minima_ptr + at, mask=both, other=0.0).to(tl.float32)
            channel = first * GROUP + part * WIDTH + channel_of_byte
            x = tl.load(x_rows + channel[None, :], mask=token_inside[:, None] & inside[None, :], other=0.0)
            numbers = numbers.to(x.dtype)
            if UPCAST:
                x, numbers = x.to(tl.float32), numbers.to(tl.float32)
            sums = tl.dot(x, numbers, sums, input_precision="ieee")
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + row, mask=row_inside, other=0.0).to(tl.float32)[None, :]
    place = out_ptr + token.to(tl.int64)[:, None] * num_rows + row[None, :]
    tl.store(place, sums.to(out_ptr.dtype.element_ty), mask=token_inside[:, None] & row_inside[None, :])


def quantised_linear(x: Tensor, weight: WeightCodes, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `linear_ops.linear`."""
    num_tokens, num_rows = x.shape[0], weight.shape[0]
    out = torch.empty(num_tokens, num_rows, dtype=dtype, device=x.device)
    tile = linear_tile(num_tokens)
    if num_tokens and num_rows:
        grid = (triton.cdiv(num_rows, tile.block_n), triton.cdiv(num_tokens, tile.block_t))
        quantised_linear_kernel[grid](
            x,
            weight.codes,
            weight.scales,
            weight.minima,
            bias,
            out,
            num_tokens,
            num_rows,
            weight.scales.shape[1],
            x.stride(0),
            BITS=weight.bits,
            BLOCK_T=tile.block_t,
            BLOCK_N=tile.block_n,
            GROUPS=tile.groups,
            UPCAST=INTERPRETED,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out

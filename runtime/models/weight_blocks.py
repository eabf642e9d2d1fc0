"""Matrices as codes (kernels/weight_codes.py): taken from GGUF's blocks, or made of numbers."""

from itertools import pairwise

import torch
from torch import Tensor

from ...kernels.weight_codes import WeightCodes
from .ggml_blocks import Bytes
from .weight_formats import BLOCK, BlockFormat, block_bytes

_HALF = BLOCK // 2
# How many bytes of a block come before its codes: the scale and the minimum.
_HEADS: dict[BlockFormat, int] = {"Q8_0": 2, "Q4_0": 2, "Q4_1": 4}


def codes_in(memory: Tensor, format: BlockFormat, shape: tuple[int, int], dtype: torch.dtype) -> WeightCodes:
    """A matrix [N, K] laid out in `memory`, [bytes] uint8: codes, scales, minima. Nothing is written."""
    num_rows, groups = shape[0], shape[1] // BLOCK
    count = num_rows * groups
    code_bytes = block_bytes(format) - _HEADS[format]
    ends = [count * code_bytes + i * count * 2 for i in range(_HEADS[format] // 2 + 1)]
    codes = memory[: ends[0]].view(num_rows, groups * code_bytes)
    heads = [memory[start:end].view(torch.float16).view(num_rows, groups) for start, end in pairwise(ends)]
    return WeightCodes(
        codes.view(torch.int8) if format == "Q8_0" else codes,
        heads[0],
        heads[1] if format == "Q4_1" else None,
        dtype,
    )


def taken(data: Bytes, format: BlockFormat) -> tuple[Tensor, ...]:
    """Codes, scales and minima, as WeightCodes has them, of stored rows of blocks, [N, bytes]."""
    head = _HEADS[format]
    blocks = torch.from_numpy(data).view(len(data), -1, block_bytes(format))
    numbers = blocks[:, :, :head].contiguous().view(torch.float16)
    codes = blocks[:, :, head:].reshape(len(data), -1)
    codes = codes.view(torch.int8) if format == "Q8_0" else codes
    return (codes, *(numbers[:, :, i] for i in range(head // 2)))


def made(values: Tensor, format: BlockFormat) -> tuple[Tensor, ...]:
    """The same of numbers, [N, K]: each code is the one whose number is nearest. Only Q8_0 and Q4_1 are made.

    A group with a number that is not finite becomes NaN throughout, so that nothing hides it.
    """
    groups = values.float().view(len(values), -1, BLOCK)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    if format == "Q8_0":
        scales, minima = (torch.maximum(-low, high) / 127).half(), None
        levels = groups / scales
        codes = levels.nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8).view(values.shape)
    else:
        assert format == "Q4_1", f"{format} is only taken from files"
        minima = low.half()
        scales = ((high - minima.float()) / 15).half()
        levels = (groups - minima) / scales
        nibbles = levels.nan_to_num(0.0).round().clamp(0, 15).to(torch.uint8)
        codes = (nibbles[:, :, :_HALF] | nibbles[:, :, _HALF:] << 4).reshape(len(values), -1)
    return tuple(t if t is codes else t.squeeze(2) for t in (codes, scales, minima) if t is not None)

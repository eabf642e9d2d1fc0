"""ggml's blocks of quantised numbers, widened to float32.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. The three of 32 numbers a block that files of small
models are made of are widened here, in torch: many times as fast as gguf's numpy, with the same bits. gguf does the others.
"""

from typing import Any

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

SCALE_BYTES = 2  # a float16


def widen(data: Bytes, stored: str) -> torch.Tensor:
    """[rows, bytes] of whole blocks to [rows, elements] in float32; `stored` is a key of STORED_TYPES."""
    if stored == "Q8_0":
        blocks, (scale,) = _blocks(data, 32, num_scales=1)
        values = blocks.view(torch.int8).float().mul_(scale)
    elif stored == "Q4_0":
        blocks, (scale,) = _blocks(data, 16, num_scales=1)
        values = _halves(blocks).sub_(8).mul_(scale)
    elif stored == "Q4_1":
        blocks, (scale, least) = _blocks(data, 16, num_scales=2)
        values = _halves(blocks).mul_(scale).add_(least)
    else:
        values = torch.from_numpy(quants.dequantize(data, GGMLQuantizationType[stored]))
    return values.view(len(data), -1)


def _blocks(data: Bytes, num_bytes: int, num_scales: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The blocks' numbers [blocks, num_bytes], uint8, and the scales that stand before them, each [blocks, 1] in float32."""
    scale_bytes = num_scales * SCALE_BYTES
    blocks = torch.from_numpy(data).view(-1, scale_bytes + num_bytes)
    scales = blocks[:, :scale_bytes].contiguous().view(torch.float16).float()
    return blocks[:, scale_bytes:], scales.split(1, dim=1)


def _halves(blocks: torch.Tensor) -> torch.Tensor:
    """[blocks, 16] bytes to [blocks, 32]: the low four bits of all, then the high four bits of all."""
    return torch.stack((blocks & 15, blocks >> 4), 1).view(-1, 32).float()

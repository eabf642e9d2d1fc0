"""What the doors to the kernels refuse, with a ValueError that names the argument."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check(name: str, tensor: Tensor, shape: Sequence[int | str], like: Tensor, dtype: torch.dtype) -> None:
    """Refuses a tensor with another shape (a str stands for any size), dtype or device than expected."""
    got = tensor.shape
    fits = len(got) == len(shape)
    if fits:
        for size, wanted in zip(got, shape, strict=True):
            if size != wanted and not isinstance(wanted, str):
                fits = False
    if not fits or tensor.dtype != dtype or tensor.device != like.device:
        expected = f"[{', '.join(map(str, shape))}] {dtype} on {like.device}"
        raise ValueError(
            f"{name}: expected shape {expected}, got {list(got)} {tensor.dtype} on {tensor.device}"
        )


def check_rows(name: str, tensor: Tensor) -> None:
    """Refuses a tensor whose last dimension is strided: the kernels read rows of adjacent elements."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        raise ValueError(f"{name}: expected shape with adjacent last elements, got strides {tensor.stride()}")

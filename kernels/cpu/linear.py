"""Products with weight matrices on CPU, in C (linear.c), or in torch where there is no compiler and for steps of many tokens."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import FORMAT_CODES, load
from .tape import call, empty, no_memory

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHANNELS = 32  # of a product of tiles
_MOST_DOTS = 64  # tokens up to which a plain weight is read in C; torch's blocks are better for more


class _Linear(ctypes.Structure):
    """struct linear"""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "w", "bias", "out")),
        *((name, _INT) for name in ("num_tokens", "n", "k", "x_stride", "format", "to_float32")),
        ("num_threads", _INT),
    )


class _Rows(ctypes.Structure):
    """struct rows"""

    _fields_ = (
        *((name, _POINTER) for name in ("w", "ids", "out")),
        *((name, _INT) for name in ("num_ids", "first_row", "whole", "n", "k")),
        *((name, _INT) for name in ("number_bytes", "packed", "format")),
        ("scale", ctypes.c_float),
    )


@cache
def _library() -> ctypes.CDLL | None:
    """None without a compiler."""
    library = load("linear.c", "-fopenmp", "-ffp-contract=fast")
    if library is not None:
        library.linear_pack.argtypes = [_POINTER, _INT, _INT]
    return library


def can_pack(weight: Tensor) -> bool:
    """Whether a weight, [N, K], may be packed for the processor's matrix unit, if it has one."""
    width = weight.shape[1]
    fits = weight.dtype == torch.bfloat16 and width > 0 and width % _CHANNELS == 0 and weight.is_contiguous()
    library = _library()
    return fits and library is not None and bool(library.linear_packs())


def pack(weight: Tensor) -> None:
    """Packs a weight that `can_pack`, in place. Raises MemoryError."""
    library = _library()
    assert library is not None, "see can_pack"
    if library.linear_pack(weight.data_ptr(), *weight.shape):
        raise no_memory(1)


def linear(x: Tensor, weight: Tensor, packed: bool, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `linear_ops.linear`."""
    library = _library()
    num_tokens = x.shape[0]
    if not packed and (
        library is None or x.dtype not in _DTYPES or not weight.is_contiguous() or num_tokens > _MOST_DOTS
    ):
        return F.linear(x, weight, bias).to(dtype)
    assert library is not None, "see can_pack"
    out = empty((num_tokens, weight.shape[0]), dtype)
    arguments = _Linear(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        num_tokens,
        *weight.shape,
        x.stride(0),
        FORMAT_CODES[x.dtype],
        dtype == torch.float32,
        torch.get_num_threads(),
    )
    call(library.linear_packed if packed else library.linear_plain, arguments, no_memory)
    return out


def rows(ids: Tensor, weight: Tensor, packed: bool, first_row: int | None, scale: float) -> Tensor | None:
    """See `linear_ops.embedding`; None where there is no compiler."""
    library = _library()
    if library is None or weight.dtype not in _DTYPES or not weight.is_contiguous():
        assert not packed, "see can_pack"
        return None
    if ids.dtype != torch.int64 or not ids.is_contiguous():
        ids = ids.to(torch.int64).contiguous()
    num_rows, width = weight.shape
    out = empty((*ids.shape, width), weight.dtype)
    arguments = _Rows(
        weight.data_ptr(),
        ids.data_ptr(),
        out.data_ptr(),
        ids.numel(),
        first_row or 0,
        first_row is None,
        num_rows,
        width,
        weight.element_size(),
        packed,
        FORMAT_CODES[weight.dtype],
        scale,
    )
    call(library.linear_rows, arguments, lambda status: IndexError(f"an id outside of {num_rows} rows"))
    return out

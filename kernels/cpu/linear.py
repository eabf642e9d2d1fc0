"""Products with a weight matrix on the matrix unit of the processor, in C (linear.c), where it has one."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from .library import load

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
CHUNK = 32  # channels of a product of tiles


class _Arguments(ctypes.Structure):
    """struct linear"""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "w", "bias", "out")),
        *((name, _INT) for name in ("num_tokens", "n", "k", "x_stride", "to_float32", "num_threads")),
    )


@cache
def _library() -> ctypes.CDLL | None:
    """None without a compiler, or without a matrix unit that this process may use."""
    library = load("linear.c", "-fopenmp", "-ffp-contract=off")
    if library is None or not library.linear_available():
        return None
    library.linear_pack.argtypes = [_POINTER, _INT, _INT]
    library.linear_rows.argtypes, library.linear_rows.restype = [_POINTER] * 3 + [_INT] * 3, None
    return library


def can_pack(weight: Tensor) -> bool:
    """Whether there is a way to read this weight, [N, K], packed."""
    width = weight.shape[1]
    fits = weight.dtype == torch.bfloat16 and width > 0 and width % CHUNK == 0 and weight.is_contiguous()
    return fits and _library() is not None


def pack(weight: Tensor) -> None:
    """Packs a weight that `can_pack`, in place. Raises MemoryError."""
    library = _library()
    assert library is not None, "see can_pack"
    if library.linear_pack(weight.data_ptr(), *weight.shape):
        raise MemoryError(f"no memory to pack a weight of {tuple(weight.shape)}")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `linear_ops.linear`; the weight is packed."""
    library = _library()
    assert library is not None, "see can_pack"
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=dtype)
    arguments = _Arguments(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        *x.shape[:1],
        *weight.shape,
        x.stride(0),
        dtype == torch.float32,
        torch.get_num_threads(),
    )
    if library.linear(ctypes.byref(arguments)):
        raise MemoryError(f"no memory for a product with a weight of {tuple(weight.shape)}")
    return out


def rows(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows of a packed weight."""
    library = _library()
    assert library is not None, "see can_pack"
    ids = ids.to(torch.int64).contiguous()
    out = torch.empty((*ids.shape, weight.shape[1]), dtype=weight.dtype)
    library.linear_rows(weight.data_ptr(), ids.data_ptr(), out.data_ptr(), ids.numel(), *weight.shape)
    return out

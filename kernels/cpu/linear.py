"""Products with weight matrices on CPU, in C (linear.c), or in torch: without a compiler, and where it is faster."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weight_codes import WeightCodes
from .library import FORMAT_CODES, load
from .tape import call, empty, no_memory

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHANNELS = 32  # of a product of tiles
MOST_DOTS = 64  # tokens up to which a plain weight is read in C; see _fast_in_torch
_PIECE_BYTES = 64 << 20  # numbers that are made of codes at a time for a product in torch


class _Codes(ctypes.Structure):
    """struct codes"""

    _fields_ = (
        *((name, _POINTER) for name in ("codes", "scales", "minima")),
        *((name, _INT) for name in ("bits", "groups")),
    )


class _Linear(ctypes.Structure):
    """struct linear"""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "w", "bias", "out")),
        *((name, _INT) for name in ("num_tokens", "n", "k", "x_stride", "format", "to_float32")),
        *((name, _INT) for name in ("num_threads", "gated", "gelu")),
        ("codes", _Codes),
    )


class _Rows(ctypes.Structure):
    """struct rows"""

    _fields_ = (
        *((name, _POINTER) for name in ("w", "ids", "out")),
        *((name, _INT) for name in ("num_tokens", "first_row", "whole", "n", "k")),
        *((name, _INT) for name in ("number_bytes", "packed", "format")),
        ("codes", _Codes),
        ("scale", ctypes.c_float),
    )


@cache
def _library(*more_flags: str) -> ctypes.CDLL | None:
    """None without a compiler."""
    library = load("linear.c", *more_flags)
    if library is not None:
        library.linear_packs.argtypes = [_INT]
        library.linear_pack.argtypes = [_POINTER, _INT, _INT]
        library.linear_pack_codes.argtypes = [_POINTER, _INT]
    return library


@cache
def _fast_in_torch(dtype: torch.dtype) -> bool:
    """Whether torch's products of many tokens are fast: for 16 bits that takes at least AVX-512, else C is several times faster."""
    if dtype == torch.float32 or not torch.backends.mkldnn.is_available():
        return dtype == torch.float32
    asked = torch.ops.mkldnn
    supported = (
        asked._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else asked._is_mkldnn_fp16_supported
    )
    return bool(supported())


def can_pack(weight: Tensor | WeightCodes) -> bool:
    """Whether a weight, [N, K], may be packed: for the matrix unit or the vectors of the processor."""
    width = weight.shape[1]
    fits = weight.dtype in _DTYPES and width > 0 and width % _CHANNELS == 0
    whole = isinstance(weight, WeightCodes) or weight.is_contiguous()
    library = _library()
    return fits and whole and library is not None and bool(library.linear_packs(FORMAT_CODES[weight.dtype]))


def pack(weight: Tensor | WeightCodes) -> None:
    """Packs a weight that `can_pack`, in place. Raises MemoryError."""
    library = _library()
    assert library is not None, "see can_pack"
    if isinstance(weight, WeightCodes):
        status = library.linear_pack_codes(ctypes.byref(_codes(weight)), weight.shape[0])
    else:
        halves = weight.shape[1] * weight.dtype.itemsize // 2
        status = library.linear_pack(weight.data_ptr(), weight.shape[0], halves)
    if status:
        raise no_memory(status)


def linear(
    x: Tensor, weight: Tensor | WeightCodes, packed: bool, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See `linear_ops.linear`."""
    library = _library()
    num_tokens = x.shape[0]
    if packed:
        return _packed(x, weight, bias, dtype)
    strided = isinstance(weight, Tensor) and not weight.is_contiguous()
    if library is None or x.dtype not in _DTYPES or strided:
        return _in_torch(x, weight, bias).to(dtype)
    if num_tokens > MOST_DOTS and _fast_in_torch(x.dtype):
        return _in_torch(x, weight, bias).to(dtype)
    out = empty((num_tokens, weight.shape[0]), dtype)
    call(library.linear_plain, _arguments(x, weight, bias, out), no_memory)
    return out


def gated_linear(x: Tensor, weight: Tensor | WeightCodes, gelu: bool) -> Tensor:
    """See `linear_ops.gated_linear`, of a packed weight whose rows of gate and up lie in turns of 16."""
    return _packed(x, weight, None, x.dtype, gated=True, gelu=gelu)


def _packed(
    x: Tensor,
    weight: Tensor | WeightCodes,
    bias: Tensor | None,
    dtype: torch.dtype,
    gated: bool = False,
    gelu: bool = False,
) -> Tensor:
    library = _library()
    assert library is not None, "see can_pack"
    out = empty((x.shape[0], weight.shape[0] // 2 if gated else weight.shape[0]), dtype)
    arguments = _arguments(x, weight, bias, out)
    arguments.gated, arguments.gelu = gated, gelu
    call(library.linear_packed, arguments, no_memory)
    return out


def _arguments(x: Tensor, weight: Tensor | WeightCodes, bias: Tensor | None, out: Tensor) -> _Linear:
    """Not gated."""
    return _Linear(
        x.data_ptr(),
        _place(weight),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        *weight.shape,
        x.stride(0),
        FORMAT_CODES[x.dtype],
        out.dtype == torch.float32,
        torch.get_num_threads(),
        codes=_codes(weight),
    )


def rows(
    ids: Tensor, weight: Tensor | WeightCodes, packed: bool, first_row: int | None, scale: float
) -> Tensor | None:
    """See `linear_ops.embedding`; None where there is no compiler."""
    library = _library()
    plain = isinstance(weight, Tensor) and (weight.dtype not in _DTYPES or not weight.is_contiguous())
    if library is None or plain:
        assert not packed, "see can_pack"
        return None
    if ids.dtype != torch.int64 or not ids.is_contiguous():
        ids = ids.to(torch.int64).contiguous()
    num_rows, width = weight.shape
    out = empty((*ids.shape, width), weight.dtype)
    arguments = _Rows(
        _place(weight),
        ids.data_ptr(),
        out.data_ptr(),
        ids.numel(),
        first_row or 0,
        first_row is None,
        num_rows,
        width,
        weight.dtype.itemsize,
        packed,
        FORMAT_CODES[weight.dtype],
        _codes(weight),
        scale,
    )
    call(library.linear_rows, arguments, lambda status: IndexError(f"an id outside of {num_rows} rows"))
    return out


def _place(weight: Tensor | WeightCodes) -> int | None:
    return weight.data_ptr() if isinstance(weight, Tensor) else None


def _codes(weight: Tensor | WeightCodes) -> _Codes:
    """All zeros for a weight that is not kept as codes."""
    if isinstance(weight, Tensor):
        return _Codes()
    minima = None if weight.minima is None else weight.minima.data_ptr()
    return _Codes(
        weight.codes.data_ptr(),
        weight.scales.data_ptr(),
        minima,
        weight.bits,
        weight.scales.shape[1],
    )


def _in_torch(x: Tensor, weight: Tensor | WeightCodes, bias: Tensor | None) -> Tensor:
    """Codes become numbers in pieces of rows, a matrix of ordinary size in one."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    num_rows, width = weight.shape
    most = max(1, _PIECE_BYTES // max(1, width * weight.dtype.itemsize))
    products = []
    for first in range(0, num_rows, most):
        end = min(first + most, num_rows)
        wide = rows(torch.arange(first, end), weight, False, None, 1.0)
        if wide is None:
            wide = weight.rows(slice(first, end)).widen()
        products.append(F.linear(x, wide, None if bias is None else bias[first:end]))
        del wide  # before the next piece takes its room
    if not products:
        return x.new_empty(x.shape[0], 0)
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)

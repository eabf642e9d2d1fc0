"""The sampler's operations on CPU: C where there is a compiler, else torch. See `sampling_ops`."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from ..sampling_ops import BINS
from . import sampling_torch
from .library import load


@cache
def _library() -> ctypes.CDLL | None:
    """None without a compiler."""
    library = load("sampling.c")
    if library is not None:
        pointer, size, int_ = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        rows = (pointer, size, size, size)  # logits, row stride, rows, columns
        for name, arguments in {
            "sampling_argmax": (*rows, *[pointer] * 5, size, pointer, int_),
            "sampling_best": (pointer, size, size, pointer, pointer),
            "sampling_mass": (*rows, pointer, pointer, int_),
            "sampling_histogram": (*rows, *[pointer] * 4, int_, pointer, int_),
            "sampling_philox": (pointer, pointer, size, size, size, pointer),
            "sampling_gumbel": (pointer, size, pointer, pointer),
        }.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
    return library


def _rows(logits: Tensor) -> tuple[int, int, int, int]:
    return logits.data_ptr(), logits.stride(0), logits.shape[0], logits.shape[1]


def row_argmax(scores: Tensor, first_token: int) -> Tensor:
    """See `sampling_ops.row_argmax`."""
    library = _library()
    if library is None:
        return sampling_torch.row_argmax(scores, first_token)
    packed = scores.new_empty(len(scores), dtype=torch.int64)
    vectors = (None,) * 5
    library.sampling_argmax(*_rows(scores), *vectors, first_token, packed.data_ptr(), torch.get_num_threads())
    return packed


def gumbel_argmax(
    logits: Tensor,
    temperature: Tensor,
    cut: Tensor,
    seeds: Tensor,
    places: Tensor,
    sampled: Tensor,
    first_token: int,
) -> Tensor:
    """See `sampling_ops.gumbel_argmax`."""
    library = _library()
    if library is None:
        return sampling_torch.gumbel_argmax(logits, temperature, cut, seeds, places, sampled, first_token)
    packed = torch.empty_like(seeds)
    library.sampling_argmax(
        *_rows(logits),
        temperature.data_ptr(),
        cut.data_ptr(),
        seeds.data_ptr(),
        places.data_ptr(),
        sampled.data_ptr(),
        first_token,
        packed.data_ptr(),
        torch.get_num_threads(),
    )
    return packed


def best_of_ranks(packed: Tensor) -> tuple[Tensor, Tensor]:
    """See `sampling_ops.best_of_ranks`."""
    library = _library()
    if library is None:
        return sampling_torch.best_of_ranks(packed)
    ranks, rows = packed.shape
    best, token = packed.new_empty(rows, dtype=torch.float32), packed.new_empty(rows)
    library.sampling_best(packed.data_ptr(), ranks, rows, best.data_ptr(), token.data_ptr())
    return best, token


def row_mass(logits: Tensor, max_logits: Tensor) -> Tensor:
    """See `sampling_ops.row_mass`."""
    library = _library()
    if library is None:
        return sampling_torch.row_mass(logits, max_logits)
    mass = torch.empty_like(max_logits, dtype=torch.int64)
    library.sampling_mass(*_rows(logits), max_logits.data_ptr(), mass.data_ptr(), torch.get_num_threads())
    return mass


def count_histogram(logits: Tensor, prefix: Tensor, shift: int) -> Tensor:
    """See `sampling_ops.count_histogram`."""
    library = _library()
    if library is None:
        return sampling_torch.count_histogram(logits, prefix, shift)
    histogram = prefix.new_empty(len(prefix), BINS)
    library.sampling_histogram(
        *_rows(logits),
        None,
        None,
        None,
        prefix.data_ptr(),
        shift,
        histogram.data_ptr(),
        torch.get_num_threads(),
    )
    return histogram


def mass_histogram(
    logits: Tensor, temperature: Tensor, cut: Tensor, max_logits: Tensor, prefix: Tensor, shift: int
) -> Tensor:
    """See `sampling_ops.mass_histogram`."""
    library = _library()
    if library is None:
        return sampling_torch.mass_histogram(logits, temperature, cut, max_logits, prefix, shift)
    histogram = prefix.new_empty(len(prefix), BINS)
    library.sampling_histogram(
        *_rows(logits),
        temperature.data_ptr(),
        cut.data_ptr(),
        max_logits.data_ptr(),
        prefix.data_ptr(),
        shift,
        histogram.data_ptr(),
        torch.get_num_threads(),
    )
    return histogram


def philox(seeds: Tensor, places: Tensor, first_token: int, count: int) -> Tensor:
    """The words of the noise, [R, count] int64 in 0..2^32-1; for tests."""
    library = _library()
    if library is None:
        return sampling_torch.philox(seeds, places, first_token, count)
    words = seeds.new_empty(len(seeds), count)
    library.sampling_philox(
        seeds.data_ptr(), places.data_ptr(), len(seeds), first_token, count, words.data_ptr()
    )
    return words


def gumbel(bits: Tensor) -> Tensor:
    """The noise that bits [N] int64 in 0..2^23-1 make, float32; for tests."""
    library = _library()
    if library is None:
        return sampling_torch.gumbel(bits)
    noise, bound = torch.empty(len(bits)), torch.empty(len(bits))
    library.sampling_gumbel(bits.data_ptr(), len(bits), noise.data_ptr(), bound.data_ptr())
    return noise

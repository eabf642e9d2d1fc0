"""The door to the sampler's kernels: formulas, shapes and dtypes of every operation, and the choice of the back end.

Logits are one rank's columns of the vocabulary, [R, V] float32 with rows of adjacent elements. What several ranks
(or several programs of one launch) find is put together from integers, by sums or by the largest one, so
no result depends on how columns are spread. `sampling_reference.py` defines the same operations in plain torch.

Two functions are only nearly the same on all back ends: exp (some units in the last place) and the noise (2 units at
most). Ranks of one job must therefore share a back end, and then they agree bit for bit.

Each function raises ValueError when a shape, dtype or device does not fit; the contents of tensors are the caller's
promise, since reading them would stop the device.
"""

from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from .checks import check, check_rows

MASS_BITS = 40  # mass 1.0 is 2^40: that of 2^22 tokens still fits into an int64
BINS = 256  # of a radix histogram: the values of one byte
MAX_TOKENS = 1 << 32  # so that a token fits into the low word of a packed score


class Backend(Protocol):
    """What `kernels.cpu.sampling` and `kernels.triton.sampling` offer. Arguments are already checked."""

    def row_argmax(self, scores: Tensor, first_token: int) -> Tensor: ...

    def gumbel_argmax(
        self,
        logits: Tensor,
        temperature: Tensor,
        cut: Tensor,
        seeds: Tensor,
        places: Tensor,
        sampled: Tensor,
        first_token: int,
    ) -> Tensor: ...

    def best_of_ranks(self, packed: Tensor) -> tuple[Tensor, Tensor]: ...

    def row_mass(self, logits: Tensor, max_logits: Tensor) -> Tensor: ...

    def count_histogram(self, logits: Tensor, prefix: Tensor, shift: int) -> Tensor: ...

    def mass_histogram(
        self,
        logits: Tensor,
        temperature: Tensor,
        cut: Tensor,
        max_logits: Tensor,
        prefix: Tensor,
        shift: int,
    ) -> Tensor: ...


_MODULES = {"cuda": ".triton.sampling", "cpu": ".cpu.sampling"}


@cache
def _backend(device_type: str) -> Backend:
    """The back end of a device type; triton is imported only when the first CUDA tensor comes."""
    if device_type not in _MODULES:
        raise ValueError(f"device: expected one of {', '.join(_MODULES)}, got {device_type}")
    return cast(Backend, import_module(_MODULES[device_type], __package__))


def _check_logits(name: str, logits: Tensor) -> None:
    check(name, logits, ("R", "V"), logits, torch.float32)
    check_rows(name, logits)
    if not 0 < logits.shape[1] < MAX_TOKENS:
        raise ValueError(f"{name}: expected shape [R, V] with 0 < V < 2^32, got {list(logits.shape)}")


def _check_vectors(logits: Tensor, dtype: torch.dtype, **vectors: Tensor) -> None:
    for name, vector in vectors.items():
        check(name, vector, (logits.shape[0],), logits, dtype)
        if not vector.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {vector.stride()}")


def row_argmax(scores: Tensor, *, first_token: int) -> Tensor:
    """The largest score of each row with its token, packed into one number that all ranks compare: see `best_of_ranks`.

    Above is the score's key, a signed 32-bit integer in the order of the values: the same for both zeros, and the
    largest, 2^31 - 1, for NaN. Below is 2^32 - 1 - token, so that of equal scores the lowest token is the largest.

    scores   [R, V] float32, of tokens first_token + column < 2^32
    returns  packed [R] int64
    """
    _check_logits("scores", scores)
    _check_tokens(scores, first_token)
    return _backend(scores.device.type).row_argmax(scores, first_token)


def gumbel_argmax(
    logits: Tensor,
    temperature: Tensor,
    cut: Tensor,
    seeds: Tensor,
    places: Tensor,
    sampled: Tensor,
    *,
    first_token: int,
) -> Tensor:
    """row_argmax of the scores that make the largest one a sample of the softmax (Gumbel-max, Gumbel, 1954).

        x = logit / temperature
        score = x + g where `sampled`, else x;  -inf where x < cut (a NaN is not below anything)

    The noise g of a row and a token depends on their names alone. Philox4x32-10 (Salmon, Moraes, Dror and Shaw,
    "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed as key (low word first) and the counter
    (token // 4, low word of place, high word of place, 0) gives four words, of which word token % 4 is taken. Its upper
    23 bits b make u = (b + 0.5) / 2^23, never 0 or 1, and g = -log(-log u), between -2.82 and 16.64: the words are the
    same on all back ends, g is within 2 units in the last place of the exact value. Division and sum are float32.

    logits       [R, V] float32, of tokens first_token + column < 2^32
    temperature  [R] float32, > 0
    cut          [R] float32, in units of x; -inf keeps everything
    seeds        [R] int64, the bits of the unsigned 64-bit seeds
    places       [R] int64, position in the sequence + 2^32 * which sample of its prompt; read as 64 bits
    sampled      [R] bool
    returns      packed [R] int64, see row_argmax
    """
    _check_logits("logits", logits)
    _check_vectors(logits, torch.float32, temperature=temperature, cut=cut)
    _check_vectors(logits, torch.int64, seeds=seeds, places=places)
    _check_vectors(logits, torch.bool, sampled=sampled)
    _check_tokens(logits, first_token)
    return _backend(logits.device.type).gumbel_argmax(
        logits, temperature, cut, seeds, places, sampled, first_token
    )


def best_of_ranks(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The largest score of each row over all ranks, and its token: the lowest of equal ones.

    packed   [N, R] int64: what row_argmax or gumbel_argmax found on each rank, N > 0
    returns  best [R] float32 (0.0 for either zero), token [R] int64, -1 where the best is NaN or infinite
    """
    check("packed", packed, ("N", "R"), packed, torch.int64)
    if not packed.is_contiguous() or not len(packed):
        raise ValueError(f"packed: expected contiguous rows of at least one rank, got {list(packed.shape)}")
    return _backend(packed.device.type).best_of_ranks(packed)


def row_mass(logits: Tensor, max_logits: Tensor) -> Tensor:
    """The denominator of a softmax in fixed point: sum over the row of round(exp(logit - max_logit) * 2^40).

    Each entry is rounded to an integer before it is added, so any order and any sharding give the same sum, and
    log(mass / 2^40) + max_logit is the log-sum-exp of the row. The difference is float32.

    logits      [R, V] float32
    max_logits  [R] float32, at least the row's largest logit
    returns     [R] int64; undefined in rows whose maximum is not finite
    """
    _check_logits("logits", logits)
    _check_vectors(logits, torch.float32, max_logits=max_logits)
    return _backend(logits.device.type).row_mass(logits, max_logits)


def count_histogram(logits: Tensor, prefix: Tensor, shift: int) -> Tensor:
    """One round of a radix select: how many keys that begin with the prefix have each value of the next byte.

    The key of a float32 with bits i is 2^31 + i for a positive sign, else 2^32 - 1 - i (of the unsigned bits): keys
    from 0 to 2^32 - 1 in the order of the values, -0.0 just below 0.0. An entry counts in bin (key >> shift) & 255
    if key >> (shift + 8) == prefix.

    logits   [R, V] float32
    prefix   [R] int64; 0 in the first round. A negative one leaves the row out: its bins are 0.
    shift    24, 16, 8 or 0
    returns  [R, 256] int64
    """
    _check_logits("logits", logits)
    _check_vectors(logits, torch.int64, prefix=prefix)
    _check_shift(shift)
    return _backend(logits.device.type).count_histogram(logits, prefix, shift)


def mass_histogram(
    logits: Tensor, temperature: Tensor, cut: Tensor, max_logits: Tensor, prefix: Tensor, shift: int
) -> Tensor:
    """As count_histogram, but an entry adds its mass: with x = logit / temperature,

        mass = round(exp(x - max_logit) * 2^40) where x >= cut, else 0

    The keys are those of the logits, not of x: division by a positive number keeps the order.

    logits, prefix, shift   as in count_histogram
    temperature, cut        as in gumbel_argmax
    max_logits              [R] float32, at least the row's largest x
    returns                 [R, 256] int64; undefined in rows whose maximum is not finite
    """
    _check_logits("logits", logits)
    _check_vectors(logits, torch.float32, temperature=temperature, cut=cut, max_logits=max_logits)
    _check_vectors(logits, torch.int64, prefix=prefix)
    _check_shift(shift)
    return _backend(logits.device.type).mass_histogram(logits, temperature, cut, max_logits, prefix, shift)


def _check_tokens(logits: Tensor, first_token: int) -> None:
    if not 0 <= first_token <= MAX_TOKENS - logits.shape[1]:
        raise ValueError(f"first_token: expected tokens from 0 to 2^32 - 1, got {first_token}")


def _check_shift(shift: int) -> None:
    if shift not in (0, 8, 16, 24):
        raise ValueError(f"shift: expected 24, 16, 8 or 0, got {shift}")

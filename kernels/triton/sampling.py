"""The sampler's operations: a program takes some columns of one row, and what programs find is put together as integers.

Sums of integers and the largest of packed (score, token) pairs do not depend on the order of programs. exp is the
device's in float32, log in float64: near u = 1/e the noise's outer logarithm takes away the inner one's leading digits.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sampling_ops import BINS
from ..tiles import BEST_ROWS, SAMPLING_BLOCK, SAMPLING_COLUMNS


@triton.jit
def _signed_key(x):
    """int32 in the order of the float32 values."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _packed(score, token):
    """int64: the score above, with one key for both zeros and the largest for NaN; the token below, lowest largest."""
    key = _signed_key(tl.where(score == 0.0, 0.0, score))
    key = tl.where(score != score, 0x7FFFFFFF, key)
    return (key.to(tl.int64) << 32) | (0xFFFFFFFF - token.to(tl.int64))


@triton.jit
def _words(seed, place, first_counter, BLOCK: tl.constexpr):
    """The Philox words of BLOCK tokens from 4 * first_counter, uint32."""
    counter = (first_counter + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zeros = counter * 0
    position, index = zeros + place.to(tl.uint32), zeros + (place >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter, position, index, zeros)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def _gumbel(bits):
    """-log(-log u), u = (bits + 0.5) / 2^23."""
    uniform = (bits.to(tl.float64) + 0.5) * 1.1920928955078125e-07
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _mass(difference):
    """exp(difference) * 2^40 rounded to an integer, in float32, which from 2^23 on is one; 0 for NaN."""
    mass = tl.exp(tl.where(difference <= 0.0, difference, float("-inf"))) * 1099511627776.0
    return tl.where(mass < 8388608.0, (mass + 8388608.0) - 8388608.0, mass).to(tl.int64)


@triton.jit
def _quotient(x, y, BLOCK: tl.constexpr):
    """x [BLOCK] / y, correctly rounded, so that it keeps the order of x; plain / is approximate in float32."""
    return tl.div_rn(x, tl.full([BLOCK], 1.0, tl.float32) * y)


@triton.jit
def argmax_kernel(
    logits_ptr,
    temperature_ptr,
    cut_ptr,
    seeds_ptr,
    places_ptr,
    sampled_ptr,
    packed_ptr,
    row_stride,
    columns,
    first_token,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """packed[range, row]: the largest packed score of the range. Without NOISE, the logits are the scores."""
    row = tl.program_id(0).to(tl.int64)
    # Token ids, aligned so that each group of four has one counter.
    begin = first_token // 4 * 4 + tl.program_id(1).to(tl.int64) * COLUMNS
    largest = tl.full([BLOCK], -0x8000000000000000, tl.int64)
    if NOISE:
        temperature, cut = tl.load(temperature_ptr + row), tl.load(cut_ptr + row)
        seed, place = tl.load(seeds_ptr + row), tl.load(places_ptr + row)
        sampled = tl.load(sampled_ptr + row) != 0
    for start in range(0, COLUMNS, BLOCK):
        column = begin + start - first_token + tl.arange(0, BLOCK)
        inside = (column >= 0) & (column < columns)
        score = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=0.0)
        if NOISE:
            scaled = _quotient(score, temperature, BLOCK)
            noise = _gumbel(_words(seed, place, (begin + start) // 4, BLOCK) >> 9)
            score = tl.where(sampled, scaled + noise, scaled)
            score = tl.where(scaled < cut, float("-inf"), score)
        found = tl.where(inside, _packed(score, first_token + column), -0x8000000000000000)
        largest = tl.maximum(largest, found)
    tl.store(packed_ptr + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + row, tl.max(largest, 0))


@triton.jit
def best_kernel(packed_ptr, best_ptr, token_ptr, ranks, rows, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest of each row's packed scores [ranks, rows], taken apart."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.arange(0, RANKS)[:, None].to(tl.int64)
    inside = (rank < ranks) & (row < rows)
    largest = tl.max(tl.load(packed_ptr + rank * rows + row, mask=inside, other=-0x8000000000000000), 0)
    key = (largest >> 32).to(tl.int32)
    best = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    token = tl.where(tl.abs(best) < float("inf"), 0xFFFFFFFF - (largest & 0xFFFFFFFF), -1)
    tl.store(best_ptr + row, best, mask=row < rows)
    tl.store(token_ptr + row, token, mask=row < rows)


@triton.jit
def mass_kernel(
    logits_ptr,
    max_logits_ptr,
    mass_ptr,
    row_stride,
    columns,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """mass[row] += the masses of the program's columns."""
    row = tl.program_id(0).to(tl.int64)
    max_logit = tl.load(max_logits_ptr + row)
    total = tl.full([BLOCK], 0, tl.int64)
    for start in range(0, COLUMNS, BLOCK):
        column = tl.program_id(1).to(tl.int64) * COLUMNS + start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * row_stride + column, mask=column < columns, other=float("-inf"))
        total += tl.where(column < columns, _mass(x - max_logit), 0)
    tl.atomic_add(mass_ptr + row, tl.sum(total, 0))


@triton.jit
def histogram_kernel(
    logits_ptr,
    temperature_ptr,
    cut_ptr,
    max_logits_ptr,
    prefix_ptr,
    histogram_ptr,
    row_stride,
    columns,
    shift,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """histogram[row, byte] += the weight, 1 or the mass, of each key that begins with the prefix."""
    row = tl.program_id(0).to(tl.int64)
    prefix = tl.load(prefix_ptr + row)
    if MASS:
        temperature, cut = tl.load(temperature_ptr + row), tl.load(cut_ptr + row)
        max_logit = tl.load(max_logits_ptr + row)
    for start in range(0, COLUMNS, BLOCK):
        column = tl.program_id(1).to(tl.int64) * COLUMNS + start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * row_stride + column, mask=column < columns, other=0.0)
        begins = (_signed_key(x).to(tl.int64) + 0x80000000) >> shift  # of the key, up to this round's byte
        taken = (column < columns) & ((begins >> 8) == prefix)
        bin_ptr = histogram_ptr + row * 256 + (begins & 255)
        if MASS:
            scaled = _quotient(x, temperature, BLOCK)
            mass = _mass(scaled - max_logit)
            tl.atomic_add(bin_ptr, mass, mask=taken & (scaled >= cut) & (mass > 0))
        else:
            tl.atomic_add(bin_ptr, tl.full([BLOCK], 1, tl.int64), mask=taken)


@triton.jit
def philox_kernel(seeds_ptr, places_ptr, out_ptr, first_token, count, BLOCK: tl.constexpr):
    """out[row, i]: the word of token first_token + i."""
    row = tl.program_id(0).to(tl.int64)
    begin = first_token // 4 * 4 + tl.program_id(1).to(tl.int64) * BLOCK
    column = begin - first_token + tl.arange(0, BLOCK)
    words = _words(tl.load(seeds_ptr + row), tl.load(places_ptr + row), begin // 4, BLOCK)
    tl.store(out_ptr + row * count + column, words.to(tl.int64), mask=(column >= 0) & (column < count))


@triton.jit
def gumbel_kernel(bits_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """out = the noise of the bits."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(bits_ptr + place, mask=place < count, other=0)
    tl.store(out_ptr + place, _gumbel(bits), mask=place < count)


def _argmax(logits: Tensor, vectors: tuple[Tensor | None, ...], first_token: int, noise: bool) -> Tensor:
    rows, columns = logits.shape
    ranges = triton.cdiv(first_token % 4 + columns, SAMPLING_COLUMNS)
    packed = torch.empty(ranges, rows, dtype=torch.int64, device=logits.device)
    argmax_kernel[(rows, ranges)](
        logits,
        *vectors,
        packed,
        logits.stride(0),
        columns,
        first_token,
        NOISE=noise,
        BLOCK=SAMPLING_BLOCK,
        COLUMNS=SAMPLING_COLUMNS,
        num_warps=4,
    )
    return packed[0] if ranges == 1 else packed.amax(0)


def row_argmax(scores: Tensor, first_token: int) -> Tensor:
    """See `sampling_ops.row_argmax`."""
    return _argmax(scores, (None,) * 5, first_token, noise=False)


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
    vectors = (temperature, cut, seeds, places, sampled.view(torch.int8))
    return _argmax(logits, vectors, first_token, noise=True)


def best_of_ranks(packed: Tensor) -> tuple[Tensor, Tensor]:
    """See `sampling_ops.best_of_ranks`."""
    ranks, rows = packed.shape
    best, token = packed.new_empty(rows, dtype=torch.float32), packed.new_empty(rows)
    best_kernel[(triton.cdiv(rows, BEST_ROWS),)](
        packed, best, token, ranks, rows, RANKS=triton.next_power_of_2(ranks), BLOCK=BEST_ROWS, num_warps=1
    )
    return best, token


def row_mass(logits: Tensor, max_logits: Tensor) -> Tensor:
    """See `sampling_ops.row_mass`."""
    rows, columns = logits.shape
    mass = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    mass_kernel[(rows, triton.cdiv(columns, SAMPLING_COLUMNS))](
        logits,
        max_logits,
        mass,
        logits.stride(0),
        columns,
        BLOCK=SAMPLING_BLOCK,
        COLUMNS=SAMPLING_COLUMNS,
        num_warps=4,
    )
    return mass


def count_histogram(logits: Tensor, prefix: Tensor, shift: int) -> Tensor:
    """See `sampling_ops.count_histogram`."""
    return _histogram(logits, (None, None, None), prefix, shift, mass=False)


def mass_histogram(
    logits: Tensor, temperature: Tensor, cut: Tensor, max_logits: Tensor, prefix: Tensor, shift: int
) -> Tensor:
    """See `sampling_ops.mass_histogram`."""
    return _histogram(logits, (temperature, cut, max_logits), prefix, shift, mass=True)


def _histogram(
    logits: Tensor, vectors: tuple[Tensor | None, ...], prefix: Tensor, shift: int, mass: bool
) -> Tensor:
    rows, columns = logits.shape
    histogram = torch.zeros(rows, BINS, dtype=torch.int64, device=logits.device)
    histogram_kernel[(rows, triton.cdiv(columns, SAMPLING_COLUMNS))](
        logits,
        *vectors,
        prefix,
        histogram,
        logits.stride(0),
        columns,
        shift,
        MASS=mass,
        BLOCK=SAMPLING_BLOCK,
        COLUMNS=SAMPLING_COLUMNS,
        num_warps=4,
    )
    return histogram


def philox(seeds: Tensor, places: Tensor, first_token: int, count: int) -> Tensor:
    """The words of the noise, [R, count] int64 in 0..2^32-1; for tests."""
    words = torch.empty(len(seeds), count, dtype=torch.int64, device=seeds.device)
    grid = (len(seeds), triton.cdiv(first_token % 4 + count, SAMPLING_BLOCK))
    philox_kernel[grid](seeds, places, words, first_token, count, BLOCK=SAMPLING_BLOCK)
    return words


def gumbel(bits: Tensor) -> Tensor:
    """The noise that bits [N] int64 in 0..2^23-1 make, float32; for tests."""
    noise = torch.empty(len(bits), dtype=torch.float32, device=bits.device)
    gumbel_kernel[(triton.cdiv(len(bits), SAMPLING_BLOCK),)](bits, noise, len(bits), BLOCK=SAMPLING_BLOCK)
    return noise

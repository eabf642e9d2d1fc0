"""The sampler's operations in torch, for CPUs without a compiler: some passes over [R, V] each. See `sampling_ops`."""

import torch
from torch import Tensor

from ..sampling_ops import BINS, MASS_BITS

_WORD = 0xFFFFFFFF
_SIGN_MASK = 0x7FFFFFFF  # all bits of a word but its sign
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1, as 32-bit fractions
_ROUNDS = 10
_LANES = 4  # words per counter


def row_argmax(scores: Tensor, first_token: int) -> Tensor:
    """See `sampling_ops.row_argmax`."""
    best, column = scores.max(1)
    keys = torch.where(best.isnan(), _SIGN_MASK, _signed_keys(best + 0.0)).long()
    return (keys << 32) | (_WORD - first_token - column)


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
    scaled = logits / temperature[:, None]
    noise = gumbel(philox(seeds, places, first_token, logits.shape[1]).bitwise_right_shift_(9))
    scores = noise.mul_(sampled[:, None]).add_(scaled)
    return row_argmax(scores.masked_fill_(scaled < cut[:, None], -torch.inf), first_token)


def best_of_ranks(packed: Tensor) -> tuple[Tensor, Tensor]:
    """See `sampling_ops.best_of_ranks`."""
    largest = packed.amax(0)
    keys = (largest >> 32).int()
    best = (((keys >> 31) & _SIGN_MASK) ^ keys).view(torch.float32)
    return best, torch.where(best.isfinite(), _WORD - (largest & _WORD), -1)


def row_mass(logits: Tensor, max_logits: Tensor) -> Tensor:
    """See `sampling_ops.row_mass`."""
    return _masses(logits, max_logits).sum(1)


def count_histogram(logits: Tensor, prefix: Tensor, shift: int) -> Tensor:
    """See `sampling_ops.count_histogram`."""
    return _histogram(logits, torch.ones_like(logits, dtype=torch.int64), prefix, shift)


def mass_histogram(
    logits: Tensor, temperature: Tensor, cut: Tensor, max_logits: Tensor, prefix: Tensor, shift: int
) -> Tensor:
    """See `sampling_ops.mass_histogram`."""
    scaled = logits / temperature[:, None]
    kept = scaled.masked_fill_(scaled < cut[:, None], -torch.inf)
    return _histogram(logits, _masses(kept, max_logits), prefix, shift)


def _masses(scaled: Tensor, max_logits: Tensor) -> Tensor:
    return (scaled - max_logits[:, None]).exp_().mul_(2.0**MASS_BITS).round_().long()


def _histogram(logits: Tensor, weights: Tensor, prefix: Tensor, shift: int) -> Tensor:
    keys = _signed_keys(logits).long() + 2**31
    # Entries with the prefix differ from it by this round's byte. Others count in a second half that nobody reads,
    # spread over it: many additions to one place would wait for each other.
    offsets = (keys >> shift) - (prefix[:, None] << 8)
    others = ((offsets >> 8) != 0).long() * BINS
    bins = (offsets & (BINS - 1)) | others
    return weights.new_zeros(len(logits), 2 * BINS).scatter_add_(1, bins, weights)[:, :BINS].contiguous()


def _signed_keys(values: Tensor) -> Tensor:
    """int32 in the order of the float32 values."""
    bits = values.view(torch.int32)
    return ((bits >> 31) & _SIGN_MASK) ^ bits


def gumbel(bits: Tensor) -> Tensor:
    """-log(-log u) of bits int64 in 0..2^23-1. In double: near u = 1/e the outer logarithm takes away digits."""
    return bits.double().add_(0.5).mul_(2.0**-23).log_().neg_().log_().neg_().float()


def philox(seeds: Tensor, places: Tensor, first_token: int, count: int) -> Tensor:
    """The words of the noise: [R, count] int64 in 0..2^32-1, may be a view."""
    first_counter = first_token // _LANES
    counters = torch.arange(first_counter, -(-(first_token + count) // _LANES), device=seeds.device)
    words = _philox_4x32(counters, *_halves(places[:, None]), *_halves(seeds[:, None]))
    start = first_token - first_counter * _LANES
    return words.flatten(1)[:, start : start + count]


def _halves(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high words of 64 bits."""
    return bits & _WORD, bits >> 32 & _WORD


def _philox_4x32(counters: Tensor, position: Tensor, index: Tensor, key0: Tensor, key1: Tensor) -> Tensor:
    """[R, len(counters), 4] int64: the four words of the counters (counter, position, index, 0)."""
    x0 = counters + torch.zeros_like(position)
    x1 = position + torch.zeros_like(counters)
    x2, x3 = index + torch.zeros_like(counters), torch.zeros_like(x0)
    product0, product1 = torch.empty_like(x0), torch.empty_like(x0)
    for _ in range(_ROUNDS):
        # A product wraps around 2^64, which leaves its 64 bits right. Words 1 and 3 keep them all until the end:
        # only words that get multiplied must be clean above bit 31. In place, as fresh memory costs more than the ops.
        torch.mul(x0, _MULTIPLIERS[0], out=product0)
        torch.mul(x2, _MULTIPLIERS[1], out=product1)
        torch.bitwise_right_shift(product1, 32, out=x0)
        torch.bitwise_right_shift(product0, 32, out=x2)
        x0.bitwise_xor_(x1).bitwise_xor_(key0).bitwise_and_(_WORD)
        x2.bitwise_xor_(x3).bitwise_xor_(key1).bitwise_and_(_WORD)
        x1, product1 = product1, x1
        x3, product0 = product0, x3
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
    return torch.stack((x0, x1, x2, x3), 2).bitwise_and_(_WORD)

"""Exact cuts through numbers that are spread over ranks, without sorting and without gathering them.

Radix select: the float32 values become integers of the same order, and four rounds find the cut's four bytes, most
significant first, from a histogram that is summed over the ranks. Everything summed is an integer, so the result
does not depend on how values are spread over ranks, nor on the order of sums.
"""

import torch
from torch import Tensor

from ...parallel.group import Group

_BINS = 256
MASS_BITS = 40  # mass 1.0 is 2^40, and mass of 2^22 tokens still fits into an int64


def ordered_keys(values: Tensor) -> Tensor:
    """int32 keys in the order of the float32 values: a < b gives key(a) < key(b), and key(-0.0) = key(0.0) - 1.

    NaNs lie beyond the infinities, on the side of their sign bit.
    """
    bits = values.view(torch.int32)
    return ((bits >> 31) & 0x7FFFFFFF) ^ bits


def values_of_keys(keys: Tensor) -> Tensor:
    """The float32 values of int32 keys: the inverse of `ordered_keys`."""
    return (((keys >> 31) & 0x7FFFFFFF) ^ keys).view(torch.float32)


def fixed_point_mass(logits: Tensor, max_logits: Tensor) -> Tensor:
    """exp(logit - max_logit) in units of 2^-40, rounded to integers, which add up to the same sum in any order.

    logits      [R, V] float32
    max_logits  [R] float32, at least the row's largest logit
    returns     [R, V] int64; undefined in rows whose maximum is not finite
    """
    return (logits - max_logits[:, None]).exp_().mul_(2.0**MASS_BITS).round_().long()


def cut_at_weight(group: Group, values: Tensor, weights: Tensor, targets: Tensor, where: str) -> Tensor:
    """Per row, the largest value such that all entries at or above it, on all ranks, weigh at least the target.

    Entries equal to the cut count as a whole, as `values >= cut` keeps them all.

    values   [R, V] float32, this rank's columns; V may differ between ranks
    weights  [R, V] int32 or int64, not negative; per-rank sums fit into the dtype
    targets  [R] int64, from 1 to the row's total weight on all ranks
    returns  [R] float32, the same on all ranks; undefined in rows with NaNs
    """
    keys = ordered_keys(values)
    offsets, others, bins = (
        torch.empty_like(keys),
        torch.empty_like(keys),
        torch.empty_like(keys, dtype=torch.int64),
    )
    prefix = torch.full((len(values), 1), -_BINS // 2, dtype=torch.int32, device=values.device)
    remaining = targets[:, None]
    for shift in (24, 16, 8, 0):
        # prefix holds the bytes found so far and a zero byte for this round: entries that share them differ from it
        # by this round's byte. Others count in a second half that nobody reads, spread over it: many additions
        # to one place would wait for each other. Buffers are reused, as fresh memory costs more than the ops.
        torch.bitwise_right_shift(keys, shift, out=offsets).sub_(prefix)
        torch.bitwise_right_shift(offsets, 8, out=others).ne_(0).mul_(_BINS)
        bins.copy_(offsets.bitwise_and_(_BINS - 1).bitwise_or_(others))
        histogram = weights.new_zeros(len(values), 2 * _BINS).scatter_add_(1, bins, weights)
        histogram = group.all_reduce(histogram[:, :_BINS].to(torch.int64, copy=True), where)
        at_or_above = histogram.flip(1).cumsum(1).flip(1)
        byte = ((at_or_above >= remaining).sum(1, keepdim=True) - 1).clamp_(min=0)
        remaining = remaining - (at_or_above - histogram).gather(1, byte)
        prefix = prefix + byte.int()
        if shift:
            prefix = prefix << 8
    return values_of_keys(prefix[:, 0])

"""Exact cuts through numbers that are spread over ranks, without sorting and without gathering them.

Radix select: the float32 values have integer keys of the same order, and four rounds find the cut's four bytes, most
significant first, from a histogram that is summed over the ranks. Everything summed is an integer, so the result
does not depend on how values are spread over ranks, nor on the order of sums.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.sampling_ops import BINS
from ...parallel.group import Group

Histogram = Callable[
    [Tensor, int], Tensor
]  # of prefix [R] int64 and shift: [R, 256] int64, see count_histogram


def ordered_keys(values: Tensor) -> Tensor:
    """int32 keys in the order of the float32 values: a < b gives key(a) < key(b), and key(-0.0) = key(0.0) - 1.

    NaNs lie beyond the infinities, on the side of their sign bit.
    """
    bits = values.view(torch.int32)
    return ((bits >> 31) & 0x7FFFFFFF) ^ bits


def values_of_keys(keys: Tensor) -> Tensor:
    """The float32 values of int32 keys: the inverse of `ordered_keys`."""
    return (((keys >> 31) & 0x7FFFFFFF) ^ keys).view(torch.float32)


def cut_at_weight(
    group: Group,
    histogram: Histogram,
    is_limited: Tensor,
    target: Callable[[Tensor], Tensor],
    where: str,
) -> Tensor:
    """Per row, the largest value such that all entries at or above it, on all ranks, weigh at least the target.

    Entries equal to the cut count as a whole, as `values >= cut` keeps them all.

    histogram   this rank's weights by the next byte of the keys that begin with a prefix; prefixes are negative in
                rows without a limit
    is_limited  [R] bool, the rows that a cut is wanted for
    target      of the total weight on all ranks [R] int64: [R] int64, from 1 to that
    returns     [R] float32, the same on all ranks; -inf in rows without a limit, undefined in rows with NaNs
    """
    prefix = is_limited.long() - 1
    for shift in (24, 16, 8, 0):
        counts = group.all_reduce(histogram(prefix, shift), where)
        at_or_above = counts.flip(1).cumsum(1).flip(1)
        if shift == 24:
            remaining = target(at_or_above[:, 0])[:, None]
        byte = ((at_or_above >= remaining).sum(1, keepdim=True) - 1).clamp_(min=0)
        remaining = remaining - (at_or_above - counts).gather(1, byte)
        prefix = prefix * BINS + byte[:, 0]  # a negative one stays negative
    # Prefixes begin at 0, keys at -2^31.
    return torch.where(is_limited, values_of_keys((prefix - 2**31).int()), -torch.inf)

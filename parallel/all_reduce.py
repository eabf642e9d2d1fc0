"""What the back ends of a group have in common: their interface, their error, and the order of a sum.

A transport belongs to one `Group`. Its collectives run on one thread, in the same order on every rank; only `abort`
and `close` may come from another thread. After the first error a transport is of no further use: a new group is
connected under the next epoch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

# The dtypes that can be summed, and what they are summed in.
SUM_DTYPES = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.int64: torch.int64,
}


class GroupError(RuntimeError):
    """A collective, or the start of a group, that did not come about.

    rank: the rank that reports. where: layer and op, as the caller named it. sequence: number of the collective
    in this group, from 1 (0: while connecting). missing: the ranks that died or did not arrive, when known.
    """

    def __init__(
        self, reason: str, *, rank: int, where: str, sequence: int, missing: Iterable[int] = ()
    ) -> None:
        self.reason = reason
        self.rank = rank
        self.where = where
        self.sequence = sequence
        self.missing = tuple(missing)
        at = f"rank {rank}, {where}" + (f", collective {sequence}" if sequence else "")
        super().__init__(f"{at}: {reason}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_group_error, (self.reason, self.rank, self.where, self.sequence, self.missing)


def _rebuild_group_error(
    reason: str, rank: int, where: str, sequence: int, missing: tuple[int, ...]
) -> GroupError:
    return GroupError(reason, rank=rank, where=where, sequence=sequence, missing=missing)


class Transport(Protocol):
    """What a back end does for a `Group`. Tensors are contiguous and not empty."""

    backend: str

    @property
    def sequence(self) -> int:
        """Number of the last collective begun."""

    def all_reduce(self, x: Tensor, where: str) -> None: ...
    def all_gather(self, x: Tensor, out: Tensor, where: str) -> None: ...
    def barrier(self, where: str) -> None: ...
    def abort(self, reason: str) -> None: ...
    def close(self) -> None: ...


def sum_in_rank_order(parts: Tensor, out: Tensor) -> None:
    """out = parts[0] + parts[1] + ..., from the left, in the type SUM_DTYPES names, rounded once at the end.

    parts: [world_size, *out.shape] of out's dtype.
    """
    total = parts[0].to(SUM_DTYPES[out.dtype], copy=True)
    for part in parts[1:]:
        total += part
    out.copy_(total)

"""The ranks of a group as threads of one process: for code that needs of `Group` its collectives alone."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PATIENCE_S = 60.0


class Meeting:
    """Where the ranks of one simulated group put their tensors, a thread each."""

    def __init__(self, world_size: int) -> None:
        self.tensors: list[Tensor] = [torch.empty(0)] * world_size
        self.names: list[str] = [""] * world_size
        self.barrier = threading.Barrier(world_size, timeout=PATIENCE_S)


class ThreadGroup:
    """`Group` between threads. Refuses what ranks do differently: another collective, another shape."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank = rank
        self.world_size = len(meeting.tensors)
        self.device = torch.device("cpu")
        self._meeting = meeting

    def all_gather(self, x: Tensor, where: str) -> Tensor:
        meeting = self._meeting
        assert x.is_contiguous()
        meeting.tensors[self.rank] = x.clone()
        meeting.names[self.rank] = f"{where} {tuple(x.shape)} {x.dtype}"
        meeting.barrier.wait()
        assert len(set(meeting.names)) == 1, meeting.names
        gathered = torch.stack(meeting.tensors)
        meeting.barrier.wait()
        return gathered

    def all_reduce(self, x: Tensor, where: str) -> Tensor:
        for index, part in enumerate(self.all_gather(x, where)):
            x = x.copy_(part) if index == 0 else x.add_(part)
        return x


def uneven_shares(total: int, world_size: int) -> list[range]:
    """Uneven on purpose: odd borders, and one rank with a single row."""
    borders = sorted(random.Random(world_size).sample(range(1, total - 1), world_size - 1))
    if world_size > 1:
        borders[-1] = total - 1
    return [range(*pair) for pair in itertools.pairwise([0, *borders, total])]


def run_on_threads(world_size: int, run: Callable[[ThreadGroup], T]) -> list[T]:
    """What `run` returns on each rank. A rank that raises ends the others' waiting."""
    meeting = Meeting(world_size)

    def run_rank(rank: int) -> T:
        try:
            return run(ThreadGroup(rank, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return [future.result(PATIENCE_S) for future in [pool.submit(run_rank, r) for r in range(world_size)]]

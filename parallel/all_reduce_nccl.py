"""Collectives over NCCL."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store

from .all_reduce import GroupError


class NcclTransport:
    """NCCL, for ranks that have a CUDA device each.

    Collectives are queued on the current stream and the host does not wait for them, so a rank that is gone shows at
    the step's deadline, not here. NCCL picks the order of a sum (the same on all ranks, not always rank order).
    """

    backend = "nccl"

    def __init__(
        self, store: Store, rank: int, world_size: int, timeout_s: float, device: torch.device
    ) -> None:
        from torch.distributed import ProcessGroupNCCL

        self.sequence = 0
        self._rank = rank
        self._timeout_s = timeout_s
        self._aborted: str | None = None
        self._token = torch.zeros(1, device=device)
        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)
        self._process_group: Any = ProcessGroupNCCL(PrefixStore("nccl", store), rank, world_size, options)
        self.barrier("connect")  # NCCL connects at its first collective

    def all_reduce(self, x: Tensor, where: str) -> None:
        self._begin(where)
        self._process_group.allreduce([x]).wait()

    def all_gather(self, x: Tensor, out: Tensor, where: str) -> None:
        self._begin(where)
        self._process_group._allgather_base(out, x).wait()

    def barrier(self, where: str) -> None:
        self._begin(where)
        self._process_group.allreduce([self._token]).wait()
        done: Any = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._token.device))
        deadline = time.monotonic() + self._timeout_s
        while not done.query():
            if self._aborted is not None or time.monotonic() > deadline:
                raise self._error(self._aborted or f"not finished within {self._timeout_s:g} s", where)
            time.sleep(0.001)

    def abort(self, reason: str) -> None:
        if self._aborted is None:
            self._aborted = reason
            self._process_group.abort()

    def close(self) -> None:
        """Not torch's `shutdown`: that waits, without a deadline, for collectives whose peers may be gone."""
        self.abort("the group is closed")

    def _begin(self, where: str) -> None:
        self.sequence += 1
        if self._aborted is not None:
            raise self._error(f"aborted: {self._aborted}", where)

    def _error(self, reason: str, where: str) -> GroupError:
        return GroupError(reason, rank=self._rank, where=where, sequence=self.sequence)

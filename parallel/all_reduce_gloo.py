"""Collectives over gloo."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, Work

from .all_reduce import GroupError, sum_in_rank_order

_SLICE_S = 0.05  # how often a waiting rank looks for an abort
_GRACE_S = 1.0  # how long a failed rank waits to hear which others are still there


class GlooTransport:
    """Gloo, for ranks on several hosts and for several ranks on one CUDA device.

    A sum is an all-gather and a local sum in rank order: every rank gets the same bits, and the same ones as over
    shared memory. CUDA tensors go through pinned host memory.
    """

    backend = "gloo"

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout_s: float,
        *,
        interface: str | None,
        one_host: bool,
    ) -> None:
        self.sequence = 0
        self._store = PrefixStore("gloo_status", store)
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._aborted: str | None = None
        self._buffers: dict[str, Tensor] = {}
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=timeout_s)
        if interface is not None:
            options._devices = [ProcessGroupGloo.create_device(interface=interface)]
        elif one_host:
            options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        else:
            options._devices = [ProcessGroupGloo.create_default_device()]
        # The stubs of torch do not know what a process group can do.
        self._process_group: Any = ProcessGroupGloo(PrefixStore("gloo", store), rank, world_size, options)

    def all_reduce(self, x: Tensor, where: str) -> None:
        parts = self._buffer("parts", (self._world_size, *x.shape), x)
        self._gather(x, parts, where)
        if x.is_cuda:
            total = self._buffer("total", x.shape, x)
            sum_in_rank_order(parts, total)
            x.copy_(total, non_blocking=True)
        else:
            sum_in_rank_order(parts, x)

    def all_gather(self, x: Tensor, out: Tensor, where: str) -> None:
        if x.is_cuda:
            parts = self._buffer("parts", (self._world_size, *x.shape), x)
            self._gather(x, parts, where)
            out.copy_(parts, non_blocking=True)
        else:
            self._gather(x, out, where)

    def barrier(self, where: str) -> None:
        token = torch.zeros(1, dtype=torch.uint8)
        self._gather(token, torch.empty(self._world_size, 1, dtype=torch.uint8), where)

    def abort(self, reason: str) -> None:
        if self._aborted is None:
            self._aborted = reason
            self._post("stop", {"rank": self._rank, "reason": reason, "failed": False})

    def close(self) -> None:
        self._process_group = None

    def _buffer(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A host tensor in a buffer that lives on. It is pinned for CUDA tensors, and then safe to use again: the
        next call copies from the device first, on the same stream, and so waits for the last copy out of it."""
        num_bytes = math.prod(shape) * like.element_size()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < num_bytes:
            buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=like.is_cuda)
            self._buffers[name] = buffer
        return buffer[:num_bytes].view(like.dtype).view(shape)

    def _gather(self, x: Tensor, parts: Tensor, where: str) -> None:
        self.sequence += 1
        group = self._process_group
        if group is None or self._aborted is not None:
            raise self._error(f"aborted: {self._aborted or 'the group is closed'}", where)
        # Bytes, since gloo does not take every dtype.
        own = self._buffer("own", tuple(x.shape), x).copy_(x) if x.is_cuda else x
        own = own.view(-1).view(torch.uint8)
        outputs = list(parts.view(self._world_size, -1).view(torch.uint8).unbind(0))
        try:
            work = group.allgather([outputs], [own])
        except RuntimeError as error:
            raise self._failed(str(error), where) from error
        self._wait(group, work, where)

    def _wait(self, group: Any, work: Work, where: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        try:
            while not _finished(work, _SLICE_S):
                self._look(group, work, where, deadline)
        except GroupError:
            raise
        except RuntimeError as error:
            raise self._failed(str(error), where) from error

    def _look(self, group: Any, work: Work, where: str, deadline: float) -> None:
        """Is there a reason to stop waiting?"""
        if self._aborted is not None:
            self._retire(group, work)
            raise self._error(f"aborted: {self._aborted}", where)
        stop = self._read("stop")
        if stop is not None:
            self._retire(group, work)
            if stop["failed"]:
                raise self._failed(f"stopped with rank {stop['rank']}: {stop['reason']}", where)
            self._aborted = str(stop["reason"])
            raise self._error(f"aborted by rank {stop['rank']}: {self._aborted}", where)
        if time.monotonic() > deadline:
            self._retire(group, work)
            raise self._failed(f"not finished within {self._timeout_s:g} s", where)

    def _retire(self, group: Any, work: Work) -> None:
        """Let go of a process group with work under way. Gloo cannot cancel it, and its destructor waits for the
        work's own timeout; that happens in a thread of its own, so that this rank can go on."""
        self._process_group = None
        threading.Thread(target=_wait_and_drop, args=(group, work, self._timeout_s), daemon=True).start()

    def _failed(self, reason: str, where: str) -> GroupError:
        """Tell the others that this rank has stopped, and hear which of them have not."""
        self._aborted = reason
        missing: list[int] = []
        if self._post("stop", {"rank": self._rank, "reason": reason, "failed": True}, once=True):
            self._post(f"stopped/{self._rank}", {})
            deadline = time.monotonic() + _GRACE_S
            missing = [r for r in range(self._world_size) if r != self._rank]
            while missing and time.monotonic() < deadline:
                missing = [r for r in missing if self._read(f"stopped/{r}") is None]
                time.sleep(_SLICE_S)
        if missing:
            reason = f"{reason}; no answer from ranks {missing}"
        return self._error(reason, where, missing)

    def _error(self, reason: str, where: str, missing: Iterable[int] = ()) -> GroupError:
        return GroupError(reason, rank=self._rank, where=where, sequence=self.sequence, missing=missing)

    def _post(self, key: str, record: dict[str, object], once: bool = False) -> bool:
        """False if the store is gone too, which is no news while an error is being reported."""
        try:
            if not (once and self._store.check([key])):
                self._store.set(key, json.dumps(record))
        except RuntimeError:
            return False
        return True

    def _read(self, key: str) -> dict[str, object] | None:
        try:
            if not self._store.check([key]):
                return None
            record: dict[str, object] = json.loads(self._store.get(key))
        except RuntimeError:
            return None
        return record


def _finished(work: Work, wait_s: float) -> bool:
    """Whether the work is done, waiting a little for it. Raises RuntimeError if it failed."""
    try:
        work.wait(timedelta(seconds=wait_s))
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # raises again, unless it was done just after the time was up
    return True


def _wait_and_drop(group: Any, work: Work, timeout_s: float) -> None:
    deadline = time.monotonic() + 2 * timeout_s
    while not work.is_completed() and time.monotonic() < deadline:
        time.sleep(0.1)
    del work, group

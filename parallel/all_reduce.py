"""Collectives over gloo and NCCL, and what every back end has in common.

A transport belongs to one `Group`. Its collectives run on one thread, in the same order on every rank; only `abort`
may come from another thread. After the first error a transport is of no further use: a new group is connected
under the next epoch.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, Work  # type: ignore[attr-defined]

# The dtypes that can be summed, and what they are summed in.
SUM_DTYPES = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.int64: torch.int64,
}

_SLICE_S = 0.05  # how often a waiting gloo rank looks for an abort
_GRACE_S = 1.0  # how long a failed gloo rank waits to hear which others are still there


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
    sequence: int  # number of the last collective begun

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
        while True:
            try:
                work.wait(timedelta(seconds=_SLICE_S))
                return
            except RuntimeError as error:
                if work.is_completed():
                    raise self._failed(str(error), where) from error
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


def _wait_and_drop(group: Any, work: Work, timeout_s: float) -> None:
    deadline = time.monotonic() + 2 * timeout_s
    while not work.is_completed() and time.monotonic() < deadline:
        time.sleep(0.1)
    del work, group


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
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
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
        if self._aborted is None:
            self._aborted = "the group is closed"
            self._process_group.shutdown()

    def _begin(self, where: str) -> None:
        self.sequence += 1
        if self._aborted is not None:
            raise self._error(f"aborted: {self._aborted}", where)

    def _error(self, reason: str, where: str) -> GroupError:
        return GroupError(reason, rank=self._rank, where=where, sequence=self.sequence)

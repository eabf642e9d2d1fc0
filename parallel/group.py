"""The ranks that run one model together, and the collectives between them.

A group is built from a store and never touches torch.distributed's default process group, so it can be aborted and
built again, under the next epoch, in the same process.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store

from . import shared_memory_layout
from .all_reduce import SUM_DTYPES, GroupError, Transport
from .all_reduce_gloo import GlooTransport
from .all_reduce_nccl import NcclTransport
from .shared_memory import SharedMemoryTransport
from .shared_memory_native import load_ring

__all__ = ["Group", "GroupError"]

_MIN_SLOT_BYTES = 64 * 1024
_MAX_SLOT_BYTES = 1024 * 1024  # larger payloads go in pieces, which still fit the processor's cache
_CONNECT = "connect"


class Group:
    """Sums and gathers over the ranks of one epoch.

    All ranks call the same collectives in the same order, from one thread each, with equal shapes and dtypes.
    After a GroupError the group is of no further use.

    backend: "single" (one rank, nothing to do), "shared_memory", "gloo" or "nccl"; the same on all ranks.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device, transport: Transport | None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.backend = "single" if transport is None else transport.backend
        self._transport = transport
        self._aborted: str | None = None

    @property
    def playable(self) -> bool:
        """Whether its collectives can be part of a recorded step (kernels/cpu/tape.py)."""
        transport = self._transport
        return transport is None or (isinstance(transport, SharedMemoryTransport) and transport.playable)

    @classmethod
    def single(cls, device: torch.device | str) -> Group:
        """The group of a model that is not sharded."""
        return cls(0, 1, torch.device(device), None)

    @classmethod
    def connect(
        cls,
        store: Store,
        *,
        rank: int,
        world_size: int,
        epoch: int,
        job_id: str,
        device: torch.device | str,
        host_id: str,
        timeout_s: float,
        max_bytes: int,
        interface: str | None = None,
    ) -> Group:
        """Meet the other ranks and agree on a back end.

        store: shared by all ranks; names in it carry job_id and epoch. host_id: equal for ranks on one host.
        timeout_s: bound on meeting, and on each collective after it. max_bytes: the largest usual payload; a shared
        segment holds 2 slots of about this size per rank, and larger payloads go in pieces. interface: the network
        interface for gloo between hosts; None takes the one that the host's name leads to.

        NCCL if all ranks have a CUDA device each; shared memory if all are on the CPU of one host and could attach to
        rank 0's segment; else gloo. Raises GroupError that names the ranks that did not come.
        """
        device = torch.device(device)
        if world_size == 1:
            return cls.single(device)
        store = PrefixStore(f"{job_id}/{epoch}", store)
        meeting = _Meeting(store, rank, world_size, time.monotonic() + timeout_s)
        library = load_ring() if device.type == "cpu" else None
        hellos = meeting.exchange("hello", _describe(device, host_id, library is not None))
        one_host = len({hello["host"] for hello in hellos}) == 1
        backend = _choose(hellos)
        transport: Transport | None = None
        if backend == "shared_memory":
            native = library if all(hello["native"] for hello in hellos) else None
            name = f"kvshard {job_id} {epoch}"
            transport = _attach_all(meeting, name, hellos, max_bytes, timeout_s, native)
        elif backend == "nccl":
            transport = NcclTransport(store, rank, world_size, timeout_s, device)
        if transport is None:
            try:
                transport = GlooTransport(
                    store, rank, world_size, timeout_s, interface=interface, one_host=one_host
                )
            except RuntimeError as error:
                raise GroupError(f"gloo: {error}", rank=rank, where=_CONNECT, sequence=0) from error
        return cls(rank, world_size, device, transport)

    def all_reduce(self, x: Tensor, where: str) -> Tensor:
        """Sum over the ranks, in place; returns x.

        x: contiguous, of float32, float64, bfloat16, float16 (summed in float32) or int64, on the group's device.
        The result has the same bits on all ranks. Except with NCCL it is summed in rank order.
        """
        self._check(x, where)
        if self._transport is not None and x.numel():
            assert x.dtype in SUM_DTYPES, f"{where}: cannot sum {x.dtype}"
            self._transport.all_reduce(x, where)
        return x

    def all_gather(self, x: Tensor, where: str) -> Tensor:
        """[world_size, *x.shape] with x of every rank. x: contiguous, any dtype, on the group's device, of the same
        shape on all ranks. With one rank the result is a view of x."""
        self._check(x, where)
        if self._transport is None:
            return x.unsqueeze(0)
        out = torch.empty((self.world_size, *x.shape), dtype=x.dtype, device=x.device)
        if x.numel():
            self._transport.all_gather(x, out, where)
        return out

    def barrier(self, where: str) -> None:
        """Returns when all ranks have called it."""
        self._check(None, where)
        if self._transport is not None:
            self._transport.barrier(where)

    def abort(self, reason: str) -> None:
        """Make pending and later collectives raise GroupError. From any thread.

        It reaches the other ranks too, except with NCCL, where each rank must be told by its own way.
        """
        self._aborted = self._aborted or reason
        if self._transport is not None:
            self._transport.abort(reason)

    def close(self) -> None:
        """Give back what the group holds; ends it for all ranks, like abort. Safe to call twice, or after an error."""
        self._aborted = self._aborted or "the group is closed"
        if self._transport is not None:
            self._transport.close()

    def _check(self, x: Tensor | None, where: str) -> None:
        if x is not None:
            assert x.is_contiguous(), f"{where}: a tensor of strides {x.stride()} is not contiguous"
            assert x.device.type == self.device.type, f"{where}: tensor on {x.device}, group on {self.device}"
        if self._aborted is not None:
            sequence = 0 if self._transport is None else self._transport.sequence + 1
            raise GroupError(f"aborted: {self._aborted}", rank=self.rank, where=where, sequence=sequence)


class _Meeting:
    """Exchanges of small records between all ranks through the store, before there are collectives."""

    def __init__(self, store: Store, rank: int, world_size: int, deadline: float) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.deadline = deadline

    def exchange(self, name: str, record: Any) -> list[Any]:
        """Every rank's record, by rank."""
        self.put(name, record)
        return self.take(name, range(self.world_size))

    def put(self, name: str, record: Any) -> None:
        try:
            self.store.set(f"{name}/{self.rank}", json.dumps(record))
        except RuntimeError as error:
            raise self._error(f"the store is gone: {error}", []) from error

    def take(self, name: str, ranks: range) -> list[Any]:
        keys = [f"{name}/{rank}" for rank in ranks]
        try:
            for key in keys:
                left_s = max(self.deadline - time.monotonic(), 0.001)
                self.store.wait([key], timedelta(seconds=left_s))
            return [json.loads(self.store.get(key)) for key in keys]
        except RuntimeError as error:
            raise self._explain(error, keys, ranks) from error

    def _explain(self, error: RuntimeError, keys: list[str], ranks: range) -> GroupError:
        try:
            missing = [rank for rank, key in zip(ranks, keys, strict=True) if not self.store.check([key])]
        except RuntimeError:
            return self._error(f"the store is gone: {error}", [])
        return self._error(f"ranks {missing} of {self.world_size} did not come in time", missing)

    def _error(self, reason: str, missing: list[int]) -> GroupError:
        return GroupError(reason, rank=self.rank, where=_CONNECT, sequence=0, missing=missing)


def _describe(device: torch.device, host_id: str, native: bool) -> dict[str, Any]:
    """What the other ranks must know of this one to agree on a back end."""
    on_cuda = device.type == "cuda"
    return {
        "host": host_id,
        "device": str(torch.cuda.get_device_properties(device).uuid) if on_cuda else device.type,
        "cuda": on_cuda,
        "process_id": os.getpid(),
        "pid_namespace": _pid_namespace(),
        "native": native,
        "ordered_stores": platform.machine() in ("x86_64", "AMD64"),
    }


def _pid_namespace() -> str:
    """Empty where processes of other ranks cannot be opened and watched (not Linux)."""
    try:
        return (
            os.readlink("/proc/self/ns/pid")
            if hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")
            else ""
        )
    except OSError:
        return ""


def _choose(hellos: list[dict[str, Any]]) -> str:
    if all(hello["cuda"] for hello in hellos):
        return "nccl" if len({hello["device"] for hello in hellos}) == len(hellos) else "gloo"
    alike = len({(hello["host"], hello["device"], hello["pid_namespace"]) for hello in hellos}) == 1
    ring = all(hello["native"] for hello in hellos) or all(hello["ordered_stores"] for hello in hellos)
    usable = hellos[0]["device"] == "cpu" and hellos[0]["pid_namespace"] != ""
    return "shared_memory" if alike and ring and usable else "gloo"


def _attach_all(
    meeting: _Meeting,
    name: str,
    hellos: list[dict[str, Any]],
    max_bytes: int,
    timeout_s: float,
    library: ctypes.CDLL | None,
) -> SharedMemoryTransport | None:
    """The transport, or None on all ranks if one of them could not attach."""
    transport: SharedMemoryTransport | None = None
    descriptor: int | None = None
    try:
        if meeting.rank == 0:
            slot_bytes = min(max(max_bytes, _MIN_SLOT_BYTES), _MAX_SLOT_BYTES)
            try:
                segment, descriptor, nonce = shared_memory_layout.create(name, meeting.world_size, slot_bytes)
            except OSError:
                meeting.put("segment", None)
            else:
                meeting.put("segment", [descriptor, nonce])
        (published,) = meeting.take("segment", range(1))
        if published is None:
            return None
        try:
            if meeting.rank != 0:
                segment = shared_memory_layout.attach(hellos[0]["process_id"], *published)
            process_ids = [hello["process_id"] for hello in hellos]
            transport = SharedMemoryTransport(
                segment, meeting.rank, process_ids, timeout_s=timeout_s, library=library
            )
        except OSError:
            transport = None
        attached = meeting.exchange("attached", transport is not None)
    finally:
        if descriptor is not None:
            os.close(descriptor)
    if all(attached):
        return transport
    if transport is not None:
        transport.close()
    return None

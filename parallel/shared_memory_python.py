"""The ring of shared_memory.c in numpy and torch, for hosts with no compiler.

Plain loads and stores stand in for acquire and release, which is right only where the processor keeps stores in
order: x86. The group agrees on gloo elsewhere. Sums have the same bits as in C.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.cpu.tape import Failed
from .shared_memory_layout import (
    ABORT_AT,
    ABORTED,
    BYTES,
    DEAD,
    DTYPE_CODES,
    MISMATCH,
    OK,
    RANK_BYTES,
    RANKS_AT,
    TAGS_AT,
    TIMEOUT,
    Segment,
)

Array = np.ndarray[Any, np.dtype[Any]]

_LOOK_EVERY_S = 0.005  # how often a waiting rank looks at its deadline and for dead peers
_NAP_AFTER_S = 0.02
_NAP_S = 50e-6


class PythonRing:
    """One rank's end of the ring. Each method raises `failed(status)` for a status of shared_memory_layout but OK."""

    def __init__(
        self, segment: Segment, rank: int, *, pidfds: Sequence[int], timeout_s: float, crowded: bool
    ) -> None:
        self._rank = rank
        self._world_size = segment.world_size
        self._slot_bytes = segment.slot_bytes
        self._pidfds = pidfds
        self._timeout_s = timeout_s
        self._polls = 50 if crowded else 2000
        self._peers = [r for r in range(segment.world_size) if r != rank]
        self.sequence = 0  # number of the last collective begun
        self._seq = 0  # of the last piece
        self._missing: list[int] = []
        self._words = memoryview(segment.memory)[: segment.slots_at].cast("Q")
        self._slots = [
            [
                np.frombuffer(segment.memory, np.uint8, segment.slot_bytes, segment.slot_at(r, parity))
                for r in range(segment.world_size)
            ]
            for parity in (0, 1)
        ]
        self._views: dict[np.dtype[Any], list[list[Array]]] = {}

    def all_reduce(self, x: Tensor, failed: Failed) -> None:
        # numpy does all it can: a torch call costs several times as much on tensors this small.
        sum_piece = _sum_exact if x.dtype.itemsize > 2 else partial(_sum_in_float32, x.dtype)
        flat = (x if x.dtype.itemsize > 2 else x.view(torch.int16)).view(-1).numpy()
        slots = self._slots_as(flat.dtype)

        def read(at: int, length: int, parity: int) -> None:
            sum_piece([slot[:length] for slot in slots[parity]], flat[at : at + length])

        self._run(DTYPE_CODES[x.dtype], flat, read, failed)

    def all_gather(self, x: Tensor, out: Tensor, failed: Failed) -> None:
        flat = x.view(-1).view(torch.uint8).numpy()
        rows = out.view(self._world_size, -1).view(torch.uint8).numpy()

        def read(at: int, length: int, parity: int) -> None:
            for row, slot in zip(rows, self._slots[parity], strict=True):
                row[at : at + length] = slot[:length]

        self._run(BYTES, flat, read, failed)

    def barrier(self, failed: Failed) -> None:
        self._run(BYTES, np.empty(0, np.uint8), lambda at, length, parity: None, failed)

    def missing(self) -> list[int]:
        return self._missing

    def _slots_as(self, dtype: np.dtype[Any]) -> list[list[Array]]:
        if dtype not in self._views:
            self._views[dtype] = [[slot.view(dtype) for slot in half] for half in self._slots]
        return self._views[dtype]

    def _run(self, code: int, flat: Array, read: Callable[[int, int, int], None], failed: Failed) -> None:
        status = self._collective(code, flat, read)
        if status != OK:
            raise failed(status)

    def _collective(self, code: int, flat: Array, read: Callable[[int, int, int], None]) -> int:
        self.sequence += 1
        own = self._slots_as(flat.dtype)
        per_piece = self._slot_bytes // flat.itemsize
        tag = (code + 1) << 56 | flat.nbytes
        for at in range(0, max(flat.size, 1), per_piece):
            if self._words[ABORT_AT // 8]:
                return ABORTED
            self._seq += 1
            parity = self._seq & 1
            length = min(per_piece, flat.size - at)
            own[parity][self._rank][:length] = flat[at : at + length]
            status = self._meet(tag, parity)
            if status != OK:
                return status
            read(at, length, parity)
        return OK

    def _meet(self, tag: int, parity: int) -> int:
        own = _word_index(self._rank)
        tag_offset = TAGS_AT // 8 + parity
        self._words[own + tag_offset] = tag
        self._words[own] = self._seq
        for peer in self._peers:
            if not self._arrived(peer) and (status := self._wait_for(peer)) != OK:
                return status
            if self._words[_word_index(peer) + tag_offset] != tag:
                self._missing = [peer]
                return MISMATCH
        return OK

    def _arrived(self, rank: int) -> bool:
        return self._words[_word_index(rank)] >= self._seq

    def _wait_for(self, peer: int) -> int:
        words, index, seq = self._words, _word_index(peer), self._seq
        for _ in range(self._polls):
            if words[index] >= seq:
                return OK
        start = time.monotonic()
        next_look = start + _LOOK_EVERY_S
        while words[index] < seq:
            if words[ABORT_AT // 8]:
                return ABORTED
            os.sched_yield()
            now = time.monotonic()
            if now - start > _NAP_AFTER_S:
                time.sleep(_NAP_S)
            if now < next_look:
                continue
            next_look = now + _LOOK_EVERY_S
            late = [r for r in self._peers if not self._arrived(r)]
            dead = [r for r in late if self._ended(r) and not self._arrived(r)]
            if dead:
                self._missing = dead
                return DEAD
            if late and now - start > self._timeout_s:
                self._missing = late
                return TIMEOUT
        return OK

    def _ended(self, rank: int) -> bool:
        poller = select.poll()
        poller.register(self._pidfds[rank], select.POLLIN)
        return any(events & select.POLLIN for _, events in poller.poll(0))


def _word_index(rank: int) -> int:
    return (RANKS_AT + rank * RANK_BYTES) // 8


def _sum_exact(parts: list[Array], out: Array) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # infinities add up quietly, as in torch
        np.add(parts[0], parts[1], out=out)
        for part in parts[2:]:
            np.add(out, part, out=out)


def _sum_in_float32(dtype: torch.dtype, parts: list[Array], out: Array) -> None:
    """parts and out hold the bits of bfloat16 or float16, which only torch can add."""
    total = torch.from_numpy(parts[0]).view(dtype).to(torch.float32)
    for part in parts[1:]:
        total += torch.from_numpy(part).view(dtype)
    torch.from_numpy(out).view(dtype).copy_(total)

"""The ring of shared_memory.c in numpy and torch, for hosts with no compiler.

Plain loads and stores stand in for acquire and release, which is right only where the processor keeps stores in
order: x86. The group agrees on gloo elsewhere. Sums have the same bits as in C.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

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

_LOOK_EVERY_S = 0.005  # how often a waiting rank looks at its deadline and for dead peers
_NAP_AFTER_S = 0.02
_NAP_S = 50e-6


class PythonRing:
    """One rank's end of the ring. Each method returns a status of shared_memory_layout."""

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
        self._seq = 0
        self._missing: list[int] = []
        self._words = np.frombuffer(segment.memory, dtype=np.uint64)[: segment.slots_at // 8]
        self._slots = [
            [
                torch.frombuffer(
                    segment.memory,
                    dtype=torch.uint8,
                    count=segment.slot_bytes,
                    offset=segment.slot_at(r, parity),
                )
                for r in range(segment.world_size)
            ]
            for parity in (0, 1)
        ]
        self._views: dict[torch.dtype, list[list[Tensor]]] = {}

    def all_reduce(self, x: Tensor) -> int:
        code, flat = DTYPE_CODES[x.dtype], x.view(-1)
        sum_piece = _sum_exact if x.dtype.itemsize >= 4 else _sum_in_float32
        slots_of = self._slots_as(x.dtype)

        def read(at: int, length: int, parity: int) -> None:
            sum_piece([slot[:length] for slot in slots_of[parity]], flat[at : at + length])

        return self._collective(code, flat, read)

    def all_gather(self, x: Tensor, out: Tensor) -> int:
        flat, rows = x.view(-1).view(torch.uint8), out.view(self._world_size, -1).view(torch.uint8)

        def read(at: int, length: int, parity: int) -> None:
            for row, slot in zip(rows, self._slots[parity], strict=True):
                row[at : at + length] = slot[:length]

        return self._collective(BYTES, flat, read)

    def barrier(self) -> int:
        return self._collective(BYTES, torch.empty(0, dtype=torch.uint8), lambda at, length, parity: None)

    def missing(self) -> list[int]:
        return self._missing

    def _slots_as(self, dtype: torch.dtype) -> list[list[Tensor]]:
        if dtype not in self._views:
            self._views[dtype] = [[slot.view(dtype) for slot in half] for half in self._slots]
        return self._views[dtype]

    def _collective(self, code: int, flat: Tensor, read: Callable[[int, int, int], None]) -> int:
        own = self._slots_as(flat.dtype)
        per_piece = self._slot_bytes // flat.element_size()
        tag = (code + 1) << 56 | flat.nbytes
        for at in range(0, max(flat.numel(), 1), per_piece):
            if self._words[ABORT_AT // 8]:
                return ABORTED
            self._seq += 1
            parity = self._seq & 1
            piece = flat[at : at + per_piece]
            own[parity][self._rank][: piece.numel()].copy_(piece)
            status = self._meet(tag, parity)
            if status != OK:
                return status
            read(at, piece.numel(), parity)
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
        return bool(self._words[_word_index(rank)] >= self._seq)

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


def _sum_exact(parts: list[Tensor], out: Tensor) -> None:
    """numpy: a torch call costs several times as much on tensors this small."""
    total = out.numpy()
    np.add(parts[0].numpy(), parts[1].numpy(), out=total)
    for part in parts[2:]:
        np.add(total, part.numpy(), out=total)


def _sum_in_float32(parts: list[Tensor], out: Tensor) -> None:
    total = parts[0].to(torch.float32)
    for part in parts[1:]:
        total += part
    out.copy_(total)

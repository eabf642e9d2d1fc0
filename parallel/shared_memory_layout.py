"""The shared segment: an anonymous memory file, its layout, and how ranks attach to it.

    0       nonce [32], world_size u64, slot_bytes u64
    64      abort word u64: 1 + the first rank that aborted, else 0
    4096    per rank 1024 bytes:  +0 seq u64, +16 tags u64 [2], +64 abort record (JSON, ends with a zero byte)
    ...     slots [world_size][2][slot_bytes], page-aligned

Protocol, for piece number s = 1, 2, ...: a rank copies its piece into its slot s % 2, writes there what collective it
is in (tag s % 2), publishes s in its seq, waits until everybody's seq is at least s, and reads all slots s % 2. One
wait is enough: who writes slot s % 2 again, for piece s + 2, has seen everybody at s + 1, so done with reading s.

The file has no name: rank 0 makes it with memfd_create, and the others open it through /proc. It goes when the last
process that maps it goes, however that one dies. Nothing is left behind, also between creating and attaching.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import struct

import torch

OK, TIMEOUT, ABORTED, DEAD, MISMATCH = range(5)
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int64: 4}
BYTES = 5

ABORT_AT = 64
RANKS_AT = 4096
RANK_BYTES = 1024
TAGS_AT = 16
_RECORD_AT = 64
_RECORD_BYTES = RANK_BYTES - _RECORD_AT
_PAGE_BYTES = 4096
_NONCE_BYTES = 32
_MAX_NAME = 60  # characters, so at most 240 bytes of the 249 that Linux takes
_HEADER = struct.Struct(f"={_NONCE_BYTES}sQQ")
_WORD = struct.Struct("=Q")


def _round_up(value: int) -> int:
    return -(-value // _PAGE_BYTES) * _PAGE_BYTES


class Segment:
    """The mapped segment. `memory` is the mapping; it is given back when the last user of it is gone."""

    def __init__(self, memory: mmap.mmap, world_size: int, slot_bytes: int) -> None:
        self.memory = memory
        self.world_size = world_size
        self.slot_bytes = slot_bytes
        self.slots_at = slots_at(world_size)

    def slot_at(self, rank: int, parity: int) -> int:
        return self.slots_at + (rank * 2 + parity) * self.slot_bytes

    def abort(self, rank: int, record: dict[str, object]) -> None:
        """Stop all ranks. Only the first abort counts; two at the same moment may both be first, which is as good."""
        if self.abort_record() is not None:
            return
        text = json.dumps(record, ensure_ascii=False).encode() + b"\0"
        assert len(text) <= _RECORD_BYTES, f"an abort record of {len(text)} bytes"
        at = RANKS_AT + rank * RANK_BYTES + _RECORD_AT
        self.memory[at : at + len(text)] = text
        _WORD.pack_into(self.memory, ABORT_AT, rank + 1)

    def abort_record(self) -> dict[str, object] | None:
        (word,) = _WORD.unpack_from(self.memory, ABORT_AT)
        if word == 0:
            return None
        at = RANKS_AT + (word - 1) * RANK_BYTES + _RECORD_AT
        record: dict[str, object] = json.loads(self.memory[at : at + _RECORD_BYTES].split(b"\0", 1)[0])
        return {"rank": word - 1, **record}


def slots_at(world_size: int) -> int:
    return _round_up(RANKS_AT + world_size * RANK_BYTES)


def create(name: str, world_size: int, slot_bytes: int) -> tuple[Segment, int, str]:
    """Rank 0: a new segment, its file descriptor, and its nonce in hex. The name is only for people who look into
    /proc/PID/maps. The descriptor is closed by the caller, once
    all ranks have attached. Raises OSError where the system has no memory files."""
    slot_bytes = _round_up(slot_bytes)
    descriptor = os.memfd_create(name[:_MAX_NAME], os.MFD_CLOEXEC)
    try:
        size = slots_at(world_size) + world_size * 2 * slot_bytes
        os.ftruncate(descriptor, size)
        memory = mmap.mmap(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    nonce = secrets.token_bytes(_NONCE_BYTES)
    _HEADER.pack_into(memory, 0, nonce, world_size, slot_bytes)
    return Segment(memory, world_size, slot_bytes), descriptor, nonce.hex()


def attach(process_id: int, descriptor: int, nonce: str) -> Segment:
    """The other ranks: map rank 0's segment. Raises OSError if it cannot be opened or is not the one meant."""
    opened = os.open(f"/proc/{process_id}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(opened).st_size
        if size < RANKS_AT:
            raise OSError(f"descriptor {descriptor} of process {process_id} is not a shared segment")
        memory = mmap.mmap(opened, size)
    finally:
        os.close(opened)
    found, world_size, slot_bytes = _HEADER.unpack_from(memory, 0)
    if found.hex() != nonce:
        raise OSError(f"the segment of process {process_id} carries another nonce")
    return Segment(memory, world_size, slot_bytes)

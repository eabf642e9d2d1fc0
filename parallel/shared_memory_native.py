"""The ring of shared_memory.c, called through ctypes. Without a compiler the Python ring does the same, slower."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..kernels.cpu.tape import Failed, call
from ..kernels.native import NotCompiledError, load_library
from .shared_memory_layout import BYTES, DTYPE_CODES, Segment


class _RingStruct(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("world_size", ctypes.c_int64),
        ("slot_bytes", ctypes.c_int64),
        ("spins", ctypes.c_int64),
        ("timeout_ns", ctypes.c_int64),
        ("seq", ctypes.c_uint64),
        ("sequence", ctypes.c_int64),
        ("pidfds", ctypes.c_void_p),
        ("missing", ctypes.c_void_p),
    )


class _Collective(ctypes.Structure):
    """struct collective"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ring", "x", "out")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "token_bytes", "dtype")),
    )


def load_ring() -> ctypes.CDLL | None:
    """The compiled ring; None where there is no compiler."""
    try:
        return load_library(Path(__file__).with_name("shared_memory.c"))
    except NotCompiledError:
        return None


class NativeRing:
    """One rank's end of the ring, in C. Each method raises `failed(status)` for a status of shared_memory_layout but OK."""

    def __init__(
        self,
        library: ctypes.CDLL,
        segment: Segment,
        rank: int,
        *,
        pidfds: Sequence[int],
        timeout_s: float,
        crowded: bool,
    ) -> None:
        self._collective = library.ring_collective
        self._segment = segment  # keeps the memory mapped
        self._pidfds = (ctypes.c_int * segment.world_size)(*pidfds)
        self._missing = (ctypes.c_uint8 * segment.world_size)()
        base = ctypes.addressof(ctypes.c_uint8.from_buffer(segment.memory))
        self._struct = _RingStruct(
            base=base,
            slots=base + segment.slots_at,
            rank=rank,
            world_size=segment.world_size,
            slot_bytes=segment.slot_bytes,
            spins=100 if crowded else 4000,
            timeout_ns=int(timeout_s * 1e9),
            seq=0,
            pidfds=ctypes.addressof(self._pidfds),
            missing=ctypes.addressof(self._missing),
        )
        self._address = ctypes.addressof(self._struct)

    @property
    def sequence(self) -> int:
        """Number of the last collective begun, played ones (kernels/cpu/tape.py) counted."""
        return int(self._struct.sequence)

    def all_reduce(self, x: Tensor, failed: Failed) -> None:
        address, num_tokens = x.data_ptr(), x.shape[0] if x.dim() else 1
        self._call(address, address, num_tokens, x.nbytes // num_tokens, DTYPE_CODES[x.dtype], failed)

    def all_gather(self, x: Tensor, out: Tensor, failed: Failed) -> None:
        self._call(x.data_ptr(), out.data_ptr(), 1, x.nbytes, BYTES, failed)

    def barrier(self, failed: Failed) -> None:
        self._call(None, None, 1, 0, BYTES, failed)

    def missing(self) -> list[int]:
        return [rank for rank, flag in enumerate(self._missing) if flag]

    def _call(
        self,
        x: int | None,
        out: int | None,
        num_tokens: int,
        token_bytes: int,
        dtype: int,
        failed: Failed,
    ) -> None:
        arguments = _Collective(self._address, x, out, num_tokens, token_bytes, dtype)
        call(self._collective, arguments, failed)

"""Compiles shared_memory.c with the system's compiler, at first use, and calls it through ctypes.

The library is kept in the user's cache directory under a name that covers everything it depends on, so a changed
source, compiler or processor makes a new file. No compiler is no error: the Python ring does the same, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from .shared_memory_layout import BYTES, DTYPE_CODES, Segment

_SOURCE = Path(__file__).with_name("shared_memory.c")
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
_COMPILE_TIMEOUT_S = 60


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
        ("pidfds", ctypes.c_void_p),
        ("missing", ctypes.c_void_p),
    )


def load_library() -> ctypes.CDLL | None:
    """The compiled library, from the cache or made now; None where that is not possible."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    try:
        path = _cache_directory() / f"shared_memory-{_fingerprint(compiler)}.so"
        if not path.exists():
            _compile(compiler, path)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
    pointer = ctypes.c_void_p
    library.ring_collective.argtypes = (pointer, ctypes.c_int, pointer, pointer, ctypes.c_int64)
    library.ring_collective.restype = ctypes.c_int
    return library


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    directory = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "kvshard"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def _fingerprint(compiler: str) -> str:
    """Source, flags, compiler, and the processor: a home directory may be shared by machines of several kinds."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=_COMPILE_TIMEOUT_S
    )
    digest = hashlib.sha256(_SOURCE.read_bytes())
    for part in (
        " ".join(_FLAGS).encode(),
        version.stdout,
        platform.machine().encode(),
        _processor_features(),
    ):
        digest.update(b"\0" + part)
    return digest.hexdigest()[:24]


def _processor_features() -> bytes:
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    wanted = (b"model name", b"flags", b"CPU part", b"Features")
    return b"\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: str, path: Path) -> None:
    """Compile beside the target, then rename: ranks that start together never see half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", temporary]
        subprocess.run(command, capture_output=True, check=True, timeout=_COMPILE_TIMEOUT_S)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


class NativeRing:
    """One rank's end of the ring, in C. Each method returns a status of shared_memory_layout."""

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

    def all_reduce(self, x: Tensor) -> int:
        address = x.data_ptr()
        status: int = self._collective(self._address, DTYPE_CODES[x.dtype], address, address, x.nbytes)
        return status

    def all_gather(self, x: Tensor, out: Tensor) -> int:
        status: int = self._collective(self._address, BYTES, x.data_ptr(), out.data_ptr(), x.nbytes)
        return status

    def barrier(self) -> int:
        status: int = self._collective(self._address, BYTES, None, None, 0)
        return status

    def missing(self) -> list[int]:
        return [rank for rank, flag in enumerate(self._missing) if flag]

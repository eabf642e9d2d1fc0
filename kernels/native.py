"""Compiles C sources with the system's compiler, at first use, and opens them through ctypes.

A library is kept in the user's cache directory under a name that covers everything it depends on, so a changed
source, compiler or processor makes a new file. No compiler is no error: every caller has a slower way in Python.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

# No -ffast-math: sums keep the order that they are written in, on every processor.
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
_COMPILE_TIMEOUT_S = 60


class NotCompiledError(Exception):
    """Its text says why there is no library."""


def load_library(source: Path, *extra_flags: str, exports: bool = False) -> ctypes.CDLL:
    """The compiled library, from the cache or made now. Raises NotCompiledError where that is not possible.

    exports: libraries that are loaded later find its functions by their names.
    """
    flags = (*_FLAGS, *extra_flags)
    reason = "there is no compiler: cc, gcc or clang"
    for compiler in filter(None, map(shutil.which, ("cc", "gcc", "clang"))):
        try:
            path = _cache_directory() / f"{source.stem}-{_fingerprint(compiler, flags, source)}.so"
            if not path.exists():
                _compile(compiler, flags, source, path)
            return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL if exports else ctypes.DEFAULT_MODE)
        except subprocess.CalledProcessError as error:
            lines: list[str] = error.stderr.decode(errors="replace").splitlines()
            reason = next(
                (line for line in lines if "error" in line), f"{compiler} ended with {error.returncode}"
            )
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: there is no home
            reason = str(error)
    raise NotCompiledError(reason)


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    directory = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "kvshard"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def _fingerprint(compiler: str, flags: tuple[str, ...], source: Path) -> str:
    """Source with its headers, flags, compiler, and the processor: a home directory may be shared by several kinds."""
    digest = hashlib.sha256(source.read_bytes())
    for header in sorted(source.parent.glob("*.h")):
        digest.update(b"\0" + header.read_bytes())
    for part in (" ".join(flags).encode(), _version(compiler), platform.machine().encode(), _processor()):
        digest.update(b"\0" + part)
    return digest.hexdigest()[:24]


@cache
def _version(compiler: str) -> bytes:
    command = [compiler, "--version"]
    return subprocess.run(command, capture_output=True, check=True, timeout=_COMPILE_TIMEOUT_S).stdout


@cache
def _processor() -> bytes:
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    wanted = (b"model name", b"flags", b"CPU part", b"Features")
    return b"\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: str, flags: tuple[str, ...], source: Path, path: Path) -> None:
    """Compile beside the target, then rename: ranks that start together never see half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        command = [compiler, *flags, str(source), "-o", temporary, "-lm"]
        subprocess.run(command, capture_output=True, check=True, timeout=_COMPILE_TIMEOUT_S)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)

"""Processes seen and stopped from outside, through /proc."""

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil

STOPPED_S = 60.0  # until all threads of a process have stopped, on a busy machine
POLL_S = 0.002


def stop(process: psutil.Process) -> None:
    """SIGSTOP, and wait for it: one thread takes the signal, and the others run on until it has."""
    process.suspend()
    deadline = time.monotonic() + STOPPED_S
    while _thread_states(process.pid) != {"T"}:
        assert time.monotonic() < deadline, f"{process} did not stop in {STOPPED_S} s"
        time.sleep(POLL_S)


class Steady:
    """True once a process, with so many sockets if that is said, has only slept for a while: it waits."""

    POLLS = 15

    def __init__(self, process: psutil.Process, num_sockets: int | None = None) -> None:
        self._process = process
        self._num_sockets = num_sockets
        self._seen = 0

    def __call__(self) -> bool:
        asleep = _thread_states(self._process.pid) == {"S"}
        connected = self._num_sockets in (None, num_sockets(self._process.pid))
        self._seen = self._seen + 1 if asleep and connected else 0
        return self._seen >= self.POLLS


def _thread_states(pid: int) -> set[str]:
    """S sleeping, R running or ready, T stopped, and others."""
    states = set()
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):  # it has just ended
            states.add(path.read_text().rpartition(")")[2].split()[0])
    return states


def num_sockets(pid: int) -> int:
    count = 0
    for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):  # closed meanwhile
            count += os.readlink(descriptor).startswith("socket:")
    return count


def segments(pid: int) -> set[str]:
    """Names of the shared segments that a process has mapped."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:  # it has ended
        return set()
    return {
        line.partition("memfd:")[2].removesuffix(" (deleted)") for line in lines if "memfd:kvshard" in line
    }

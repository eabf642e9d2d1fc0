"""What this host gives a process, or the container it runs in when that is less."""

import math
import os
from pathlib import Path

import psutil

# Of the container's own group; on the host itself the root group has no limits, and no such files.
_CGROUP = Path("/sys/fs/cgroup")


def host_memory_bytes() -> int:
    total: int = psutil.virtual_memory().total
    limit = _limit("memory.max")[0]
    return total if limit == "max" else min(total, int(limit))


def host_cores() -> int:
    """Cores that a process may run on, or as many as its container's share of time is worth, rounded up."""
    cores = len(os.sched_getaffinity(0))
    quota, *period = _limit("cpu.max")  # microseconds in each period
    return cores if quota == "max" else min(cores, math.ceil(int(quota) / int(period[0])))


def _limit(name: str) -> list[str]:
    path = _CGROUP / name
    return path.read_text().split() if path.exists() else ["max"]

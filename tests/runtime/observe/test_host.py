"""Memory and cores of a host and of a container, whose limits are files."""

import os
from pathlib import Path

import psutil
import pytest

from kvshard.runtime.observe import host

CORES = len(os.sched_getaffinity(0))


def test_no_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    assert host.host_cores() == CORES
    assert host.host_memory_bytes() == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000", CORES),
        ("100000 100000", 1),
        ("50000 100000", 1),
        ("120000 100000", min(CORES, 2)),
        ("6400000 50000", min(CORES, 128)),
    ],
)
def test_share_of_time(text: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert host.host_cores() == expected


def test_memory_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    for text, expected in (("max", psutil.virtual_memory().total), (str(1 << 20), 1 << 20)):
        (tmp_path / "memory.max").write_text(text + "\n")
        assert host.host_memory_bytes() == expected

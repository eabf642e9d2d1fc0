"""Shards as real processes that start in milliseconds: forked from a server that has imported torch, test after test."""

from __future__ import annotations

import time
from typing import Any

from ranks import CONTEXT

from kvshard.runtime.coordinator.launcher import Placement
from kvshard.runtime.messages import ShardJob
from kvshard.runtime.shard.main import run_shard


class ForkedLauncher:
    """What LocalLauncher does, without the second or two that a process takes to import torch."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._processes: dict[int, Any] = {}

    def place(self, device: str) -> list[Placement]:
        return [Placement("localhost", True, device)] * self._size

    def start(self, jobs: list[ShardJob]) -> None:
        for job in jobs:
            self._processes[job.rank] = CONTEXT.Process(target=run_shard, args=(job,), daemon=True)
            self._processes[job.rank].start()

    def dead(self) -> dict[int, str]:
        return {
            rank: f"its process ended with {process.exitcode}"
            for rank, process in self._processes.items()
            if process.exitcode is not None
        }

    def close(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for process in self._processes.values():
            process.join(max(deadline - time.monotonic(), 0.0))
            process.kill()
            process.join()

"""The seam to whatever starts shard processes: Ray, torchrun or this host."""

from dataclasses import dataclass
from typing import Protocol

from ..messages import ShardJob


@dataclass(frozen=True)
class Placement:
    """Where one shard is going to run."""

    host: str  # name or address, as the other hosts reach it
    same_host: bool  # as the coordinator: ipc will do
    device: str  # cpu, or cuda:<index as the shard's process counts>


class Launcher(Protocol):
    """Starts shard processes and watches them; says nothing to them afterwards."""

    def place(self, device: str) -> list[Placement]:
        """Where each rank will run, in rank order; `device` is cpu or cuda. Raises ConfigError when there is no room in time."""

    def start(self, jobs: list[ShardJob]) -> None:
        """Start one process a job; returns without waiting for them."""

    def dead(self) -> dict[int, str]:
        """Ranks whose process has ended, with what is known of why."""

    def close(self, timeout_s: float) -> None:
        """Wait for the processes to end, kill those that do not; safe to call twice."""

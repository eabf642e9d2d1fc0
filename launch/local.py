"""Shard processes on this host, forked from a nursery process."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

from ..runtime.coordinator.launcher import Placement
from ..runtime.errors import ConfigError
from ..runtime.messages import ShardJob
from .nursery import LENGTH

NO_GPU = "device=cuda and this host has no CUDA device; use device: cpu or auto"
END_S = 5.0  # for the nursery to kill what is left and end


class LocalLauncher:
    """Shard processes on this host."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._nursery: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._ended: dict[int, str] = {}

    def place(self, device: str) -> list[Placement]:
        size = self._size
        if device == "cpu":
            return [Placement("localhost", True, "cpu")] * size
        # With fewer GPUs than shards they share one: slow, but the way to try a large size on one GPU.
        import torch  # a second, and not needed for CPU

        num_gpus = torch.cuda.device_count()
        if num_gpus == 0:
            raise ConfigError(NO_GPU)
        return [Placement("localhost", True, f"cuda:{rank % num_gpus}") for rank in range(size)]

    def start(self, jobs: list[ShardJob]) -> None:
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "kvshard.launch.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A terminal's Ctrl-C goes to the whole process group; the shards are stopped by the coordinator.
            process_group=0,
        )
        self._reader = threading.Thread(target=self._read_reports, args=(len(jobs),), daemon=True)
        self._reader.start()
        assert self._nursery.stdin is not None, "stdin is a pipe"
        told = [job.to_bytes() for job in jobs]
        try:
            self._nursery.stdin.write(LENGTH.pack(len(told)))
            for data in told:
                self._nursery.stdin.write(LENGTH.pack(len(data)) + data)
            self._nursery.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which `dead` says

    def dead(self) -> dict[int, str]:
        return dict(self._ended)

    def close(self, timeout_s: float) -> None:
        if self._nursery is None or self._reader is None:
            return
        self._reader.join(timeout_s)
        assert self._nursery.stdin is not None, "stdin is a pipe"
        with suppress(BrokenPipeError):  # it has ended, and never read all of its jobs
            self._nursery.stdin.close()  # the nursery kills what is left
        try:
            self._nursery.wait(END_S)
        except subprocess.TimeoutExpired:  # stopped, or it hangs in an import
            os.killpg(self._nursery.pid, signal.SIGKILL)  # shards are in its group
            self._nursery.wait()
        self._reader.join()
        self._nursery = None

    def _read_reports(self, num_jobs: int) -> None:
        assert self._nursery is not None, "started before the reader"
        assert self._nursery.stdout is not None, "stdout is a pipe"
        for line in self._nursery.stdout:
            rank, status = line.split()
            self._ended[int(rank)] = describe_status(int(status))
        for left in range(num_jobs):
            self._ended.setdefault(left, "the process that started it ended")


def describe_status(status: int) -> str:
    """What os.waitpid's status says, in words."""
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"its process was killed by {name}{hint}"
    return f"its process ended with exit code {os.WEXITSTATUS(status)}"

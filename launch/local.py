"""Shards on this host: in this process for one, forked from a nursery process for more."""

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

import torch

from ..parallel.group import Group
from ..parallel.shard_map import ShardMap
from ..runtime.config import JobConfig
from ..runtime.coordinator.executor import ShardHealth, ShardInfo
from ..runtime.coordinator.launcher import Placement
from ..runtime.coordinator.plan import StepPlan, StepResult
from ..runtime.coordinator.remote import CacheSize
from ..runtime.errors import ConfigError
from ..runtime.messages import ShardJob
from ..runtime.models.checkpoint import open_checkpoint
from ..runtime.observe.memory_plan import host_memory_bytes
from ..runtime.shard.link import peak_memory_bytes, stacks
from ..runtime.shard.main import shard_info
from ..runtime.shard.worker import Worker
from .nursery import LENGTH


class InProcessExecutor:
    """One shard in the coordinator's own process. A plan runs when its result is asked for."""

    def __init__(self, config: JobConfig, model_path: str, size: CacheSize) -> None:
        assert config.tensor_parallel_size == 1, "only one shard runs in this process"
        self._config = config
        self._model_path = model_path
        self._size = size
        self._plans: deque[StepPlan] = deque()
        self._last_step_id = -1
        self.worker: Worker | None = None

    def start(self) -> list[ShardInfo]:
        config = self._config
        device = torch.device(config.device)
        threads = config.threads_per_shard or len(os.sched_getaffinity(0))
        torch.set_num_threads(threads)
        with open_checkpoint(Path(self._model_path)) as checkpoint:
            shard_map = ShardMap.build(checkpoint.spec.dims, 1)
            self.worker = Worker(
                config, checkpoint, shard_map, Group.single(device), self._size.max_model_len
            )
        self.worker.allocate(self._size.num_blocks)
        return [shard_info(self.worker, threads)]

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def result(self) -> StepResult:
        assert self.worker is not None, "start() comes first"
        plan = self._plans.popleft()
        result = self.worker.run(plan).wait()
        self._last_step_id = plan.step_id
        return result

    def health(self) -> list[ShardHealth]:
        return [ShardHealth(0, self._last_step_id, peak_memory_bytes(self._config.device))]

    def stacks(self) -> dict[int, str]:
        return {0: stacks()}

    def close(self) -> None:
        self._plans.clear()
        self.worker = None


def local_memory_bytes(config: JobConfig) -> int:
    """Memory of the device that a shard in this process uses."""
    if config.device == "cpu":
        return host_memory_bytes()
    return int(torch.cuda.get_device_properties(0).total_memory)


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
        num_gpus = torch.cuda.device_count()
        if num_gpus == 0:
            raise ConfigError("device=cuda and this host has no CUDA device; use device: cpu or auto")
        return [Placement("localhost", True, f"cuda:{rank % num_gpus}") for rank in range(size)]

    def start(self, jobs: list[ShardJob]) -> None:
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "kvshard.launch.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A terminal's Ctrl-C goes to the whole process group; the shards are stopped by the coordinator.
            process_group=0,
        )
        assert self._nursery.stdin is not None, "stdin is a pipe"
        self._nursery.stdin.write(LENGTH.pack(len(jobs)))
        for job in jobs:
            data = job.to_bytes()
            self._nursery.stdin.write(LENGTH.pack(len(data)) + data)
        self._nursery.stdin.flush()
        self._reader = threading.Thread(target=self._read_reports, args=(len(jobs),), daemon=True)
        self._reader.start()

    def dead(self) -> dict[int, str]:
        return dict(self._ended)

    def close(self, timeout_s: float) -> None:
        if self._nursery is None or self._reader is None:
            return
        self._reader.join(timeout_s)
        assert self._nursery.stdin is not None, "stdin is a pipe"
        self._nursery.stdin.close()  # the nursery kills what is left
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

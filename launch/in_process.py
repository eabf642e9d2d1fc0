"""One shard in the coordinator's own process. Imports torch, which the coordinator itself does not need."""

import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..parallel.group import Group
from ..parallel.shard_map import ShardMap
from ..runtime.config import JobConfig
from ..runtime.coordinator.executor import ShardHealth, ShardInfo
from ..runtime.coordinator.plan import StepPlan, StepResult
from ..runtime.coordinator.remote import CacheSize
from ..runtime.errors import ConfigError, ShardError
from ..runtime.models.checkpoint import open_checkpoint
from ..runtime.observe.host import host_cores, host_memory_bytes
from ..runtime.shard.link import peak_memory_bytes, stacks
from ..runtime.shard.main import shard_info
from ..runtime.shard.worker import PendingResult, Worker
from .local import NO_GPU


class InProcessExecutor:
    """The executor of that shard. A GPU is given each plan at once; on CPU one runs when its result is asked for."""

    def __init__(self, config: JobConfig, model_path: str, size: CacheSize) -> None:
        assert config.tensor_parallel_size == 1, "only one shard runs in this process"
        self._config = config
        self._model_path = model_path
        self._size = size
        self._plans: deque[StepPlan] = deque()
        self._launched: deque[PendingResult] = deque()  # on a GPU, of those plans
        self._last_step_id = -1
        self.worker: Worker | None = None

    def launch(self) -> None:
        """There is no process to start."""

    def start(self) -> list[ShardInfo]:
        with self._told():
            return self._start()

    def _start(self) -> list[ShardInfo]:
        config = self._config
        device = torch.device(config.device)
        threads = config.threads_per_shard or host_cores()
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
        if self._config.device == "cuda":
            assert self.worker is not None, "start() comes first"
            with self._told():
                self._launched.append(self.worker.run(plan))

    def result(self) -> StepResult:
        assert self.worker is not None, "start() comes first"
        plan = self._plans.popleft()
        with self._told():
            pending = self._launched.popleft() if self._launched else self.worker.run(plan)
            result = pending.wait()
        self._last_step_id = plan.step_id
        return result

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What can befall a shard without a fault of ours is told as of any other. The rest keeps its traceback."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, TimeoutError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise ShardError(0, socket.gethostname(), self._last_step_id + 1, cause) from None

    def health(self) -> list[ShardHealth]:
        return [ShardHealth(0, self._last_step_id, peak_memory_bytes(self._config.device))]

    def stacks(self) -> dict[int, str]:
        return {0: stacks()}

    def close(self) -> None:
        self._plans.clear()
        self._launched.clear()
        self.worker = None


def local_memory_bytes(config: JobConfig) -> int:
    """Memory of the device that a shard in this process uses."""
    if config.device == "cpu":
        return host_memory_bytes()
    if not torch.cuda.is_available():
        raise ConfigError(NO_GPU)
    return int(torch.cuda.get_device_properties(0).total_memory)

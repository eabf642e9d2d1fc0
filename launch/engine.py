"""From a job's settings to a running model: resolve, plan, start the shards, build the coordinator."""

import ctypes
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..runtime.config import JobConfig, Task
from ..runtime.coordinator.executor import Executor, ShardInfo
from ..runtime.coordinator.launcher import Launcher
from ..runtime.coordinator.limits import Limits
from ..runtime.coordinator.loop import Coordinator
from ..runtime.coordinator.remote import CacheSize, RemoteExecutor
from ..runtime.coordinator.request import Request
from ..runtime.errors import ConfigError
from ..runtime.models.checkpoint_index import read_index
from ..runtime.models.prompt import Prompt, check_token_ids, tokenize_bad_words, tokenize_prompt
from ..runtime.models.resolve import resolve_model
from ..runtime.models.spec import ModelSpec
from ..runtime.observe.memory_plan import DeviceKind, MemoryPlan, build_shard_map, plan_memory, resolve_dtype
from ..runtime.paths import cache_dir
from ..runtime.sampling_params import SamplingParams

# Of NVIDIA's driver, of Windows' under Linux, and of AMD's.
GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


class Engine:
    """A model that runs: its shards, the coordinator that drives them and the tokenizer. Use `Engine.start`."""

    def __init__(
        self,
        config: JobConfig,
        spec: ModelSpec,
        plan: MemoryPlan,
        tokenizer: Any,
        byte_tokens: dict[int, int],
        executor: Executor,
        shards: list[ShardInfo],
    ) -> None:
        self.config = config
        self.spec = spec
        self.plan = plan
        self.tokenizer = tokenizer
        self.executor = executor
        self.shards = shards
        self.coordinator = Coordinator(
            executor,
            Limits.from_config(
                config,
                num_blocks=plan.num_blocks,
                max_model_len=plan.max_model_len,
                layer_groups=spec.layer_groups,
            ),
            eos_token_ids=spec.eos_token_ids,
            tokenizer=tokenizer,
            byte_tokens=byte_tokens,
        )

    @classmethod
    def start(
        cls,
        config: JobConfig,
        *,
        launcher: Launcher | None = None,
        on_status: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """Start what `config` asks for; `launcher` replaces the one it names (torchrun's workers run already).

        Raises ConfigError or CheckpointError before a weight is read when the job cannot work or does
        not fit (for a tokenizer that cannot be loaded, once the shards' processes are started), and ShardError when a shard fails to start.
        """
        on_status(f"reading {config.model}")
        model_path = resolve_model(config.model, config.revision)
        index = read_index(model_path)
        shard_map = build_shard_map(config, index.spec)
        formats = index.weight_formats(config.quantization)
        with ExitStack() as started:
            if launcher is None:
                launcher = _launcher(config)
            if launcher is not None:
                started.callback(launcher.close, 0.0)  # asking Ray for its GPUs may have started a cluster
            config = resolve_device(config, launcher)
            device_kind: DeviceKind = "cuda" if config.device == "cuda" else "cpu"
            planned: list[MemoryPlan] = []

            def size_cache(memory: list[int] | None) -> CacheSize:
                plan = plan_memory(config, index.spec, shard_map, device_kind, memory, formats)
                plan.require_fit()
                planned.append(plan)
                return CacheSize(plan.num_blocks, plan.max_model_len)

            size_cache(None)  # what is wrong whatever the memory is said before anything is started
            executor = _executor(config, launcher, str(model_path.resolve()), size_cache)
            on_status(
                f"starting {config.tensor_parallel_size} shard(s) on {config.device} with {config.launcher}"
            )
            template = None if config.chat_template is None else _read_template(config.chat_template)
            started.callback(executor.close)
            if (
                config.launcher != "torchrun"
            ):  # its shards run already, and import while they wait for their jobs
                executor.launch()
            # While the shards import torch: transformers takes half a second.
            from ..runtime.models.tokenizer import byte_tokens, load_tokenizer

            tokenizer = load_tokenizer(model_path, config.tokenizer, cache_dir())
            if template is not None:
                tokenizer.chat_template = template
            names = byte_tokens(tokenizer)
            shards = executor.start()
            engine = cls(config, index.spec, planned[-1], tokenizer, names, executor, shards)
            started.pop_all()  # the engine's to close from here on
        return engine

    def make_request(
        self, request_id: str, prompt: Prompt, sampling: SamplingParams, task: Task = "generate"
    ) -> Request:
        """A request from a text, token ids, or chat messages.

        Raises RequestError when it cannot be tokenised, or names tokens that the model does not have.
        """
        vocab_size = self.spec.vocab_size
        check_token_ids(sampling, vocab_size, request_id)
        return Request.new(
            request_id,
            tokenize_prompt(self.tokenizer, vocab_size, request_id, prompt, for_answer=task == "generate"),
            sampling,
            self.config.seed,
            tokenize_bad_words(self.tokenizer, vocab_size, request_id, sampling.bad_words),
            task,
        )

    def close(self) -> None:
        self.executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def resolve_device(config: JobConfig, launcher: Launcher | None = None) -> JobConfig:
    """`config` with `device` and `dtype` decided. auto is cuda when every shard can have a GPU."""
    device = config.device
    if device == "auto":
        if config.launcher == "ray" and launcher is not None:
            from .ray import RayLauncher

            assert isinstance(launcher, RayLauncher), "launcher: ray has a RayLauncher"
            num_gpus = launcher.num_gpus()
        else:
            num_gpus = _num_gpus_here()
        wanted = config.tensor_parallel_size
        if config.launcher == "torchrun":  # of this host; each of the others has its own
            wanted = int(os.environ.get("LOCAL_WORLD_SIZE", wanted))
        device = "cuda" if num_gpus >= wanted else "cpu"
    dtype = resolve_dtype(config.dtype, device)
    return config.model_copy(update={"device": device, "dtype": dtype})


def _num_gpus_here() -> int:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        if not any(Path(device).exists() for device in GPU_DEVICES):
            return 0  # no driver: torch, which takes a second to import, could only say the same
    import torch

    return torch.cuda.device_count()


def _launcher(config: JobConfig) -> Launcher | None:
    """What starts the shards; None when the one shard runs in this process."""
    if config.launcher == "ray":
        from .ray import RayLauncher

        return RayLauncher(config)
    if config.tensor_parallel_size == 1:
        return None
    from .local import LocalLauncher

    return LocalLauncher(config.tensor_parallel_size)


def _executor(
    config: JobConfig,
    launcher: Launcher | None,
    model_path: str,
    size_cache: Callable[[list[int] | None], CacheSize],
) -> Executor:
    if launcher is not None:
        return RemoteExecutor(launcher, config, model_path, size_cache)
    from .in_process import InProcessExecutor, local_memory_bytes

    return InProcessExecutor(config, model_path, size_cache([local_memory_bytes(config)]))


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read chat_template={path}: {error}") from None

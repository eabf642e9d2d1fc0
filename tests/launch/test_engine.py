"""Starting an engine: what was started for one that cannot work is given back."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models_factory import make_llama

from kvshard.launch.engine import Engine, resolve_device
from kvshard.launch.in_process import InProcessExecutor
from kvshard.runtime.config import parse_config
from kvshard.runtime.coordinator.launcher import Placement
from kvshard.runtime.coordinator.remote import CacheSize
from kvshard.runtime.errors import ConfigError, ShardError
from kvshard.runtime.messages import ShardJob
from kvshard.runtime.shard.worker import Worker


class IdleLauncher:
    """Starts nothing."""

    def __init__(self, has_room: bool) -> None:
        self.has_room = has_room
        self.num_jobs = 0
        self.closed = False

    def place(self, device: str) -> list[Placement]:
        if not self.has_room:
            raise ConfigError("no room")
        return [Placement("localhost", True, device)] * 2

    def start(self, jobs: list[ShardJob]) -> None:
        self.num_jobs = len(jobs)

    def dead(self) -> dict[int, str]:
        return {}

    def close(self, timeout_s: float) -> None:
        self.closed = True


def test_a_gpu_that_is_not_there_is_told_for_one_shard_too(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    config = parse_config({"model": str(make_llama(tmp_path)), "device": "cuda"}, "test")
    with pytest.raises(ConfigError, match="this host has no CUDA device; use device: cpu or auto"):
        Engine.start(config)


@pytest.mark.parametrize(("error", "cause"), [(MemoryError, "MemoryError"), (TimeoutError, "TimeoutError")])
def test_one_shard_that_fails_is_named_as_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], cause: str
) -> None:
    def fail(*_: object) -> None:
        raise error("too much")

    monkeypatch.setattr(Worker, "allocate", fail)
    config = parse_config({"model": str(make_llama(tmp_path)), "device": "cpu", "dtype": "float32"}, "test")
    executor = InProcessExecutor(config, str(tmp_path), CacheSize(8, 64))
    with pytest.raises(ShardError, match=f"shard 0 on .* failed at step 0: {cause}: too much"):
        executor.start()


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cuda", ["launched 0", "launched 1", "waited for 0", "launched 2", "waited for 1"]),
        ("cpu", ["launched 0", "waited for 0", "launched 1", "waited for 1"]),
    ],
)
def test_one_shard_on_a_gpu_is_given_plans_ahead(tmp_path: Path, device: str, expected: list[str]) -> None:
    events: list[str] = []

    class FakeWorker:
        def run(self, plan: Any) -> Any:
            events.append(f"launched {plan.step_id}")
            return SimpleNamespace(wait=lambda: events.append(f"waited for {plan.step_id}"))

    config = parse_config({"model": "m", "device": device, "dtype": "float32"}, "test")
    executor: Any = InProcessExecutor(config, str(tmp_path), CacheSize(8, 64))
    executor.worker = FakeWorker()
    executor.submit(SimpleNamespace(step_id=0))
    for step_id in (1, 2):
        executor.submit(SimpleNamespace(step_id=step_id))
        executor.result()
    assert events == expected


@pytest.mark.parametrize(("local", "device"), [("1", "cuda"), ("2", "cpu")])
def test_under_torchrun_auto_wants_a_gpu_for_each_shard_of_the_host(
    monkeypatch: pytest.MonkeyPatch, local: str, device: str
) -> None:
    monkeypatch.setattr("kvshard.launch.engine._num_gpus_here", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    config = parse_config({"model": "m", "launcher": "torchrun", "tensor_parallel_size": 2}, "test")
    assert resolve_device(config).device == device


@pytest.mark.parametrize(
    ("settings", "has_room", "message", "num_jobs"),
    [
        ({"cache": {"num_blocks": 2}, "scheduler": {"max_model_len": 10**6}}, True, "max_model_len", 0),
        ({}, False, "no room", 0),
        ({}, True, "no tokenizer could be loaded", 2),  # found while the shards import what they need
    ],
)
def test_a_job_that_cannot_work_closes_its_launcher(
    tmp_path: Path, settings: dict[str, object], has_room: bool, message: str, num_jobs: int
) -> None:
    """Asking Ray for its GPUs may have started a cluster, which would outlive the error in a notebook."""
    model = make_llama(tmp_path)
    config = parse_config({"model": str(model), "tensor_parallel_size": 2, **settings}, "test")
    launcher = IdleLauncher(has_room)
    with pytest.raises(ConfigError, match=message):
        Engine.start(config, launcher=launcher)
    assert launcher.num_jobs == num_jobs
    assert launcher.closed

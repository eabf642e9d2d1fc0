"""Starting an engine: what was started for one that cannot work is given back."""

from pathlib import Path

import pytest
from models_factory import make_llama

from kvshard.launch.engine import Engine
from kvshard.runtime.config import parse_config
from kvshard.runtime.coordinator.launcher import Placement
from kvshard.runtime.errors import ConfigError
from kvshard.runtime.messages import ShardJob


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

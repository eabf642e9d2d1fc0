"""Starting an engine: what was started for one that cannot work is given back."""

from pathlib import Path

import pytest
from models_factory import make_llama

from kvshard.launch.engine import Engine
from kvshard.runtime.config import parse_config
from kvshard.runtime.coordinator.launcher import Placement
from kvshard.runtime.errors import ConfigError
from kvshard.runtime.messages import ShardJob


class FullLauncher:
    """Has no room for any shard."""

    def __init__(self) -> None:
        self.closed = False

    def place(self, device: str) -> list[Placement]:
        raise ConfigError("no room")

    def start(self, jobs: list[ShardJob]) -> None:
        raise AssertionError("nothing was placed")

    def dead(self) -> dict[int, str]:
        return {}

    def close(self, timeout_s: float) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": {"num_blocks": 2}, "scheduler": {"max_model_len": 10**6}}, "max_model_len"),
        ({}, "no tokenizer could be loaded"),
    ],
)
def test_a_job_that_cannot_work_closes_its_launcher(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    """Asking Ray for its GPUs may have started a cluster, which would outlive the error in a notebook."""
    model = make_llama(tmp_path)
    config = parse_config({"model": str(model), "tensor_parallel_size": 2, **settings}, "test")
    launcher = FullLauncher()
    with pytest.raises(ConfigError, match=message):
        Engine.start(config, launcher=launcher)
    assert launcher.closed

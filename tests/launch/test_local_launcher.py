"""Shards on this host: in this process, forked, and as they would be reached from another host."""

import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from running_job import make_tiny_model

from kvshard.launch import local
from kvshard.launch.engine import Engine
from kvshard.launch.local import LocalLauncher, describe_status
from kvshard.runtime.config import JobConfig, parse_config
from kvshard.runtime.coordinator.launcher import Placement
from kvshard.runtime.errors import ConfigError
from kvshard.runtime.messages import ShardJob
from kvshard.runtime.sampling_params import SamplingParams

WAIT_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def config_for(model: Path, size: int, **settings: Any) -> JobConfig:
    values = {
        "model": str(model),
        "tensor_parallel_size": size,
        "device": "cpu",
        "threads_per_shard": 1,
        "cache": {"num_blocks": 16},
        "timeouts": {"start_s": 120.0, "step_s": 60.0},
    }
    return parse_config(values | settings, "test")


def generate(engine: Engine) -> list[int]:
    sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    engine.coordinator.add(engine.make_request("one", "w7 w8 w9", sampling))
    finished = []
    while engine.coordinator.has_work:
        finished += engine.coordinator.step()
    assert len(finished) == 1
    return finished[0].output_token_ids


def own_processes() -> set[psutil.Process]:
    """All below this one. Another test's multiprocessing may have left its resource tracker."""
    return set(psutil.Process().children(recursive=True))


def test_one_shard_in_this_process(model: Path) -> None:
    before = own_processes()
    with Engine.start(config_for(model, 1)) as engine:
        assert len(generate(engine)) == 8
        (health,) = engine.executor.health()
        assert (health.rank, health.last_step_id) == (0, 7)
        assert health.peak_memory_bytes > 1e6
        assert "test_one_shard_in_this_process" in engine.executor.stacks()[0]
    assert own_processes() <= before


class ElsewhereLauncher(LocalLauncher):
    """Says that its shards are on another host, so that they are reached over tcp with CURVE."""

    def place(self, device: str) -> list[Placement]:
        return [Placement("127.0.0.1", False, device)] * 2


def test_forked_shards_and_shards_over_tcp(model: Path) -> None:
    before = own_processes()
    answers = []
    for launcher in (LocalLauncher(2), ElsewhereLauncher(2)):
        with Engine.start(config_for(model, 2), launcher=launcher) as engine:
            answers.append(generate(engine))
            assert [shard.rank for shard in engine.shards] == [0, 1]
            assert sum(shard.num_q_heads for shard in engine.shards) == 6
            running = {process.pid for process in psutil.Process().children(recursive=True)}
            assert {shard.pid for shard in engine.shards} < running
            health = engine.executor.health()
            assert [(h.rank, h.last_step_id) for h in health] == [(0, 7), (1, 7)]
            assert all(h.peak_memory_bytes > 1e6 for h in health)
            stacks = engine.executor.stacks()
            assert stacks.keys() == {0, 1}
            assert all("_run_plans" in stack and "kvshard-watch" in stack for stack in stacks.values())
        assert own_processes() <= before
    assert answers[0] == answers[1]


def test_a_tokenizer_that_cannot_be_loaded_leaves_no_process(model: Path, tmp_path: Path) -> None:
    """It is read while the process that makes the shards imports torch."""
    before = own_processes()
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        Engine.start(config_for(model, 2, tokenizer=str(tmp_path)), launcher=LocalLauncher(2))
    assert own_processes() <= before


def test_a_shard_that_dies_is_described(model: Path) -> None:
    launcher = LocalLauncher(2)
    with Engine.start(config_for(model, 2), launcher=launcher) as engine:
        victim = psutil.Process(engine.shards[1].pid)
        victim.kill()
        psutil.wait_procs([victim], WAIT_S)
        assert [health.rank for health in engine.executor.health()] == [0]
        launcher.close(0.0)
        assert "killed by SIGKILL" in launcher.dead()[1]


def test_a_nursery_that_ends_before_it_has_read_its_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "true")
    launcher = LocalLauncher(2)
    job = ShardJob(
        "j", 0, 0, 2, "ipc://e", None, " " * 2**20, "m", "cpu", "localhost"
    )  # more than a pipe holds
    launcher.start([job, job])
    launcher.close(WAIT_S)
    assert set(launcher.dead().values()) == {"the process that started it ended"}


def test_a_nursery_that_does_not_end_is_killed_with_its_shards(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, it reads as little as one that hangs in a file system. Its shards have not been told to end."""
    monkeypatch.setattr(local, "END_S", 0.1)
    launcher = LocalLauncher(2)
    with Engine.start(config_for(model, 2), launcher=launcher) as engine:
        shards = [psutil.Process(shard.pid) for shard in engine.shards]
        nursery = shards[0].parent()
        assert nursery is not None, "it runs"
        nursery.suspend()
        try:
            launcher.close(0.0)
            _, left = psutil.wait_procs(shards, 10.0)
            assert left == []
            assert set(launcher.dead()) == {0, 1}
        finally:
            for process in shards:
                if process.is_running():
                    process.kill()


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match="device=cuda and this host has no CUDA device"):
        LocalLauncher(2).place("cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [placement.device for placement in LocalLauncher(3).place("cuda")] == [
        "cuda:0",
        "cuda:1",
        "cuda:0",
    ]


@pytest.mark.parametrize("sent", [b"", struct.pack("<II", 1, 500) + b"half a job"])
def test_a_nursery_whose_parent_died_early_ends_quietly(sent: bytes) -> None:
    nursery = [sys.executable, "-m", "kvshard.launch.nursery"]
    done = subprocess.run(nursery, input=sent, capture_output=True, timeout=WAIT_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_statuses_in_words() -> None:
    assert describe_status(signal.SIGKILL) == "its process was killed by SIGKILL (out of memory?)"
    assert describe_status(signal.SIGSEGV) == "its process was killed by SIGSEGV"
    assert describe_status(3 << 8) == "its process ended with exit code 3"

"""Ray: placement, what its actors tell, and clusters that were there before."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from jobs import run_job, write_job
from other_processes import stop
from ray.cluster_utils import Cluster
from ray_cluster import free_port, running_cluster
from running_job import make_tiny_model

from kvshard.launch.engine import Engine
from kvshard.launch.ray import RayLauncher
from kvshard.runtime.config import JobConfig, parse_config
from kvshard.runtime.errors import ConfigError
from kvshard.runtime.sampling_params import SamplingParams

WAIT_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def two_cores() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, logging_level="error")
    yield
    ray.shutdown()


def config_for(model: Path, size: int, **settings: Any) -> JobConfig:
    values = {
        "model": str(model),
        "launcher": "ray",
        "tensor_parallel_size": size,
        "device": "cpu",
        "threads_per_shard": 1,
        "cache": {"num_blocks": 16},
        "timeouts": {"place_s": 120.0, "start_s": 120.0, "step_s": 60.0},
    }
    return parse_config(values | settings, "test")


def catches(process: psutil.Process, number: signal.Signals) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    assert mask
    return bool(int(mask[1], 16) >> (number - 1) & 1)


def generate(engine: Engine) -> list[int]:
    sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    engine.coordinator.add(engine.make_request("one", "w7 w8 w9", sampling))
    finished = []
    while engine.coordinator.has_work:
        finished += engine.coordinator.step()
    assert len(finished) == 1
    return finished[0].output_token_ids


@pytest.mark.usefixtures("two_cores")
def test_no_room_shows_what_is_wanted_and_what_is_there(model: Path) -> None:
    launcher = RayLauncher(config_for(model, 2, device="cuda", timeouts={"place_s": 0.5}))
    try:
        with pytest.raises(ConfigError) as caught:
            launcher.place("cuda")
    finally:
        launcher.close(0.0)
    message = str(caught.value)
    assert "2 shards of 1 CPU, 1 GPU each" in message
    assert "timeouts.place_s=0.5" in message
    assert re.search(r"\d+\.\d+\.\d+\.\d+: 2 of 2 CPU, 0 of 0 GPU", message)
    assert "tensor_parallel_size" in message
    assert ray.is_initialized(), "a cluster that was there before was shut down"


@pytest.mark.usefixtures("two_cores")
def test_actors_answer_and_leave(model: Path) -> None:
    launcher = RayLauncher(config_for(model, 2))
    with Engine.start(config_for(model, 2), launcher=launcher) as engine:
        assert len(generate(engine)) == 8
        assert [(shard.rank, shard.num_q_heads) for shard in engine.shards] == [(0, 3), (1, 3)]
        processes = [psutil.Process(shard.pid) for shard in engine.shards]
        assert [(h.rank, h.last_step_id) for h in engine.executor.health()] == [(0, 7), (1, 7)]
        assert all("_run_plans" in stack for stack in engine.executor.stacks().values())
        # The same through Ray, for a shard whose channel is silent.
        assert all("kvshard-shard" in stack for stack in launcher.stacks().values())
        told = ray.get([actor.health.remote() for actor in launcher._actors], timeout=WAIT_S)
        assert [answer["pid"] for answer in told] == [process.pid for process in processes]
        assert all(answer["running"] and answer["peak_memory_bytes"] > 1e6 for answer in told)
        assert not any(catches(process, signal.SIGTERM) for process in processes)
        stop(processes[1])  # nor does a shard that hangs keep the others from answering
        assert [h.rank for h in engine.executor.health()] == [0]
        processes[1].resume()
    assert not psutil.wait_procs(processes, WAIT_S)[1]
    assert ray.is_initialized()


@pytest.mark.slow
@pytest.mark.usefixtures("two_cores")
def test_nine_shards_find_room_on_two_cores(model: Path) -> None:
    launcher = RayLauncher(config_for(model, 9))
    placements = launcher.place("cpu")
    launcher.close(0.0)
    assert len(placements) == 9
    assert all(placement.same_host and placement.device == "cpu" for placement in placements)


@pytest.mark.slow
def test_ranks_follow_the_placement_over_two_nodes(model: Path) -> None:
    """Two nodes on this host: the driver's comes first, and the other is reached over tcp."""
    ray.shutdown()  # the module's cluster, if it is still there
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, logging_level="error")
        launcher = RayLauncher(config_for(model, 3))
        with Engine.start(config_for(model, 3), launcher=launcher) as engine:
            here = ray.get_runtime_context().get_node_id()
            nodes = [place[0] for place in ray.get([actor.where.remote() for actor in launcher._actors])]
            assert nodes[0] == here
            assert nodes[1] == nodes[2] != here
            assert len(generate(engine)) == 8
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def cluster_of_the_user(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray cluster started on the command line; it and the job must agree on whether a token is needed."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with running_cluster() as address:
        yield address


@pytest.mark.slow
@pytest.mark.parametrize("by", ["ray.address", "RAY_ADDRESS"])
def test_a_running_cluster_is_joined_and_left_running(
    by: str, model: Path, cluster_of_the_user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": f"row{i}", "prompt": f"w{3 + i} w5", "max_tokens": 6} for i in range(4)]
    values = config_for(model, 2).model_dump(mode="json", exclude={"input", "output"})
    if by == "ray.address":
        values["ray"] = {"address": cluster_of_the_user}
    else:
        monkeypatch.setenv("RAY_ADDRESS", cluster_of_the_user)
    done = run_job(write_job(tmp_path, values, rows))
    assert done.returncode == 0, done.stderr
    assert len(done.rows) == 4


@pytest.mark.slow
def test_no_cluster_at_the_address_is_told(model: Path, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    values = config_for(model, 2).model_dump(mode="json", exclude={"input", "output"}) | {
        "ray": {"address": address}
    }
    done = run_job(write_job(tmp_path, values, [{"id": "a", "prompt": "w5"}]))
    assert done.returncode == 2, done.stderr
    assert f"no Ray cluster answers at {address}" in done.stderr
    assert "check ray.address or RAY_ADDRESS" in done.stderr
    assert "Traceback" not in done.stderr

"""The executor of remote shards, with shards that are threads of the test and compute nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from fake_launcher import SIZE, WAIT_S, Behaviour, FakeLauncher

import kvshard
from kvshard.runtime.config import parse_config
from kvshard.runtime.coordinator import remote
from kvshard.runtime.coordinator.launcher import Placement
from kvshard.runtime.coordinator.plan import StepPlan
from kvshard.runtime.coordinator.remote import CacheSize, RemoteExecutor
from kvshard.runtime.errors import ConfigError, ShardError


def empty_plan(step_id: int) -> StepPlan:
    none, one = np.zeros(0, np.int32), np.zeros(1, np.int32)
    yes = np.ones(1, np.bool_)
    return StepPlan(0, step_id, none, (), none, none, none, (), one, one + 1, yes, yes, none)


@contextmanager
def executor_of(
    behaviours: dict[int, Behaviour] | None = None,
    size_cache: Callable[[list[int]], CacheSize] = lambda memory: CacheSize(8, 64),
    place_error: str | None = None,
    **timeouts: float,
) -> Iterator[tuple[RemoteExecutor, FakeLauncher]]:
    values = {"model": "m", "device": "cpu", "dtype": "float32", "tensor_parallel_size": SIZE}
    config = parse_config(values | {"timeouts": {"step_s": WAIT_S, "start_s": WAIT_S} | timeouts}, "test")
    launcher = FakeLauncher(config, behaviours or {}, place_error)
    executor = RemoteExecutor(launcher, config, "m", size_cache)
    try:
        yield executor, launcher
    finally:
        executor.close()
        assert launcher.closed
        executor.close()  # twice does no harm


def test_plans_go_to_all_and_one_result_comes_back() -> None:
    asked: list[list[int]] = []

    def size_cache(memory: list[int]) -> CacheSize:
        asked.append(memory)
        return CacheSize(8, 64)

    with executor_of(size_cache=size_cache) as (executor, launcher):
        shards = executor.start()
        assert [shard.rank for shard in shards] == [0, 1, 2]
        assert asked == [[300, 300, 300]], "the host's memory is shared by its shards"
        assert [(s.store, s.num_blocks, s.max_model_len, list(s.threads)) for s in launcher.starts] == [
            ("store:1", 8, 64, [1, 1, 1])
        ] * SIZE
        executor.submit(empty_plan(0))
        executor.submit(empty_plan(1))
        assert [executor.result().step_id, executor.result().step_id] == [0, 1]
        assert [health.last_step_id for health in executor.health()] == [0, 1, 2]
        assert executor.stacks() == {0: "a stack", 1: "a stack", 2: "a stack"}


def test_shards_on_one_gpu_share_its_memory() -> None:
    asked: list[list[int]] = []

    def size_cache(memory: list[int]) -> CacheSize:
        asked.append(memory)
        return CacheSize(8, 64)

    devices = {
        rank: Behaviour(hello={"device_id": name}) for rank, name in enumerate(["gpu-a", "gpu-b", "gpu-a"])
    }
    with executor_of(devices, size_cache=size_cache) as (executor, _):
        executor.start()
    assert asked == [[450, 900, 450]]


def test_answers_to_health_do_not_lose_results() -> None:
    with executor_of() as (executor, _):
        executor.start()
        executor.submit(empty_plan(0))
        for _ in range(20):
            assert len(executor.health()) == SIZE
        assert executor.result().token_ids.tolist() == [7]


@pytest.mark.parametrize(
    ("hello", "words"),
    [
        (
            {"version": "0.0.1"},
            ["shard 1 on node1 runs kvshard 0.0.1", kvshard.__version__, "install the same"],
        ),
        ({"config_hash": "other"}, ["shard 1 on node1", "settings", "install the same"]),
    ],
)
def test_shards_of_another_version_or_config_are_refused(hello: dict[str, Any], words: list[str]) -> None:
    with executor_of({1: Behaviour(hello=hello)}) as (executor, _):
        with pytest.raises(ConfigError) as caught:
            executor.start()
        for word in words:
            assert word in str(caught.value)


def test_a_shard_that_samples_another_token_stops_the_job() -> None:
    with executor_of({2: Behaviour(token=8)}) as (executor, _):
        executor.start()
        executor.submit(empty_plan(0))
        with pytest.raises(ShardError, match=r"shard 2 on node2 failed at step 0: .*diverged"):
            executor.result()


def test_a_late_step_names_the_shard_that_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvshard.runtime.coordinator.remote.ANSWER_S", 2.0)
    silent = Behaviour(answers_plans=False, answers_health=False)
    with executor_of({1: silent}, step_s=0.3) as (executor, _):
        executor.start()
        executor.submit(empty_plan(0))
        with pytest.raises(
            ShardError, match=r"shard 1 on node1 failed at step 0: .*timeouts\.step_s=0\.3"
        ) as caught:
            executor.result()
        assert caught.value.rank == 1


def test_a_shard_that_does_not_start_is_named() -> None:
    silent, late = Behaviour(hello=None), r"shard 2 on .*timeouts\.start_s=0\.5"
    with executor_of({2: silent}, start_s=0.5) as (executor, _), pytest.raises(ShardError, match=late):
        executor.start()


def test_a_reported_bug_names_its_shard() -> None:
    error = {"cause": "shard", "message": "KeyError: 'x'", "missing": []}
    with executor_of({1: Behaviour(error=error)}) as (executor, _):
        executor.start()
        executor.submit(empty_plan(0))
        with pytest.raises(ShardError, match="shard 1 on node1 failed at step 0: KeyError"):
            executor.result()


def test_a_user_error_of_a_shard_is_told_as_such() -> None:
    error = {"cause": "config", "message": "file model.safetensors is cut short", "missing": []}
    with executor_of({1: Behaviour(error=error)}) as (executor, _):
        executor.start()
        executor.submit(empty_plan(0))
        with pytest.raises(ConfigError, match="is cut short"):
            executor.result()


def broken(missing: list[int]) -> Behaviour:
    return Behaviour(
        error={"cause": "group", "message": "layer 3 o_proj: a rank is dead", "missing": missing}
    )


def test_a_dead_shard_is_blamed_and_not_those_that_noticed() -> None:
    """The others end too; a launcher that lists them first must not turn the blame on them."""
    silent = Behaviour(answers_plans=False)
    with executor_of({0: broken([]), 1: broken([]), 2: silent}) as (executor, launcher):
        executor.start()
        launcher.ended = {0: "it reported an error", 1: "it reported an error", 2: "killed by SIGKILL"}
        executor.submit(empty_plan(0))
        with pytest.raises(ShardError, match="shard 2 on node2 failed at step 0: killed by SIGKILL"):
            executor.result()


def test_a_hanging_shard_is_blamed_when_the_others_miss_it() -> None:
    silent = Behaviour(answers_plans=False)
    with executor_of({0: broken([1]), 1: silent, 2: broken([1])}) as (executor, _):
        executor.start()
        executor.submit(empty_plan(0))
        with pytest.raises(ShardError, match=r"shard 1 on node1 .*layer 3 o_proj"):
            executor.result()


def test_a_report_that_comes_while_the_slowest_is_looked_for_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shard is ended by then, and is silent like the one that it misses."""
    monkeypatch.setattr("kvshard.runtime.coordinator.remote.ANSWER_S", 2.0)
    late = Behaviour(answers_plans=False, error_when_asked=broken([1]).error)
    silent = Behaviour(answers_plans=False, answers_health=False)
    with executor_of({0: late, 1: silent}, step_s=0.3) as (executor, _):
        executor.start()
        executor.submit(empty_plan(0))
        with pytest.raises(ShardError, match=r"shard 1 on node1 .*layer 3 o_proj"):
            executor.result()


def test_a_launcher_without_room_is_closed_all_the_same() -> None:
    with executor_of(place_error="no room") as (executor, _), pytest.raises(ConfigError, match="no room"):
        executor.start()


@pytest.mark.parametrize(
    ("hosts", "address", "expected"),
    [
        ((("a", True), ("a", True)), None, "127.0.0.1"),
        ((("a", False), ("a", False)), "10.0.0.1", "127.0.0.1"),
        ((("a", True), ("b", False)), "10.0.0.1", "10.0.0.1"),
        ((("b", False), ("a", True)), "10.0.0.1", "b"),
    ],
    ids=["one host", "one host, not the coordinator's", "the coordinator's host first", "it last"],
)
def test_where_shards_meet(hosts: tuple[tuple[str, bool], ...], address: str | None, expected: str) -> None:
    """On many systems a host's own name means its loopback address there, which no other host can reach."""
    placements = [Placement(host, same_host, "cpu") for host, same_host in hosts]
    assert remote._store_host(placements, address) == expected

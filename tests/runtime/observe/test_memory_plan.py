"""The memory plan: exact where it says exact, and a clear verdict where a job does not fit."""

import dataclasses
import math
from typing import Any

import pytest

from kvshard.parallel.shard_map import ShardMap
from kvshard.runtime.config import JobConfig, parse_config
from kvshard.runtime.errors import ConfigError
from kvshard.runtime.models.spec import ModelSpec, RotarySpec
from kvshard.runtime.observe.cache_size import choose_num_blocks
from kvshard.runtime.observe.memory_plan import (
    MemoryPlan,
    plan_memory,
    reserve_bytes,
    resolve_dtype,
)

GIB = 2**30


def make_spec(**changed: Any) -> ModelSpec:
    """Sizes of Qwen3-4B unless changed."""
    values: dict[str, Any] = {
        "architecture": "test",
        "hidden_size": 2560,
        "num_layers": 36,
        "num_q_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "tie_embeddings": True,
        "max_position_embeddings": 40960,
        "eos_token_ids": (1,),
        "bos_token_id": None,
    } | changed
    values.setdefault("layer_windows", (None,) * values["num_layers"])
    values.setdefault("rotary", RotarySpec(theta=1e6, rotary_dim=values["head_dim"]))
    return ModelSpec(**values)


SMALL = make_spec(
    hidden_size=576,
    num_layers=30,
    num_q_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    max_position_embeddings=8192,
)


def make_config(**values: Any) -> JobConfig:
    return parse_config({"model": "demo", **values}, "test")


def plan(spec: ModelSpec, config: JobConfig, memory: Any, device: Any = "cuda") -> MemoryPlan:
    shard_map = ShardMap.build(spec.dims, config.tensor_parallel_size, config.shard_weights)
    return plan_memory(config, spec, shard_map, device, memory)


def test_published_qwen3_4b_case() -> None:
    # Published: 11.47 GiB of bfloat16 cache hold 83,488 tokens of Qwen3-4B, in blocks of 16.
    spec = make_spec()
    config = make_config(scheduler={"max_num_seqs": 256, "max_num_batched_tokens": 1024})
    shard_map = ShardMap.build(spec.dims, 1)
    [shard] = plan(spec, config, None).shards
    assert shard.kv_bytes_per_token == 147_456
    assert round(83_488 * shard.kv_bytes_per_token / GIB, 2) == 11.47
    reserve = reserve_bytes(config, spec, shard_map, "cuda")
    memory = math.ceil((shard.weight_bytes + reserve + 11.47 * GIB) / 0.9)
    fitted = plan(spec, config, memory)
    assert fitted.problem is None
    assert abs(fitted.num_tokens - 83_488) / 83_488 < 1e-3
    assert (
        fitted.shards[0].kv_bytes
        <= 11.47 * GIB
        < fitted.shards[0].kv_bytes + 2 * 16 * shard.kv_bytes_per_token
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 9])
def test_weights_and_cache_add_up(world_size: int) -> None:
    result = plan(SMALL, make_config(tensor_parallel_size=world_size, cache={"num_blocks": 10}), None, "cpu")
    matrices = 49152 * 576 + 30 * 576 * (2 * 9 * 64 + 2 * 3 * 64 + 3 * 1536)
    norms = (2 * 30 + 1) * 576
    copies = sum(shard.num_kv_heads for shard in result.shards) - 3
    replicated = copies * 30 * 576 * 2 * 64
    assert sum(shard.num_q_heads for shard in result.shards) == 9
    assert sum(s.weight_bytes for s in result.shards) == 4 * (matrices + world_size * norms + replicated)
    assert [s.kv_bytes for s in result.shards] == [
        10 * 16 * 2 * 30 * shard.num_kv_heads * 64 * 4 for shard in result.shards
    ]
    assert result.num_tokens == 9 * 16


def test_untied_head_is_counted_and_a_tied_one_is_not() -> None:
    config = make_config(cache={"num_blocks": 2})
    tied = plan(make_spec(), config, None).shards[0].weight_bytes
    untied = plan(make_spec(tie_embeddings=False), config, None).shards[0].weight_bytes
    assert untied - tied == 151936 * 2560 * 2


@pytest.mark.parametrize(
    ("dtype", "device", "resolved"),
    [("auto", "cuda", "bfloat16"), ("auto", "cpu", "float32"), ("float16", "cpu", "float16")],
)
def test_dtype(dtype: str, device: Any, resolved: str) -> None:
    assert resolve_dtype(dtype, device) == resolved
    result = plan(SMALL, make_config(dtype=dtype, cache={"num_blocks": 2}), None, device)
    assert (result.dtype, result.cache_dtype) == (resolved, resolved)


@pytest.mark.parametrize(
    ("cache_dtype", "row_bytes"), [("auto", 128 * 2), ("int8", 128 + 2), ("fp8", 128 + 2), ("int4", 64 + 2)]
)
def test_quantised_cache(cache_dtype: str, row_bytes: int) -> None:
    """36 layers, 8 KV heads of 128 channels: K and V, each with a scale of 2 bytes."""
    result = plan(make_spec(), make_config(cache={"dtype": cache_dtype, "num_blocks": 9}), None)
    shard = result.shards[0]
    assert result.cache_dtype == ("bfloat16" if cache_dtype == "auto" else cache_dtype)
    assert shard.kv_bytes_per_token == 2 * 36 * 8 * row_bytes
    assert shard.kv_bytes == 9 * 16 * shard.kv_bytes_per_token


def test_the_rank_with_least_room_decides() -> None:
    config = make_config(
        tensor_parallel_size=2, scheduler={"max_num_seqs": 1024, "max_num_batched_tokens": 1024}
    )
    both = [plan(make_spec(), config, memory).num_blocks for memory in (80 * GIB, 24 * GIB)]
    mixed = plan(make_spec(), config, [80 * GIB, 24 * GIB])
    assert mixed.num_blocks == both[1] < both[0]
    assert mixed.shards[0].usable_bytes == int(0.9 * 80 * GIB)


def test_no_more_blocks_than_requests_can_fill() -> None:
    config = make_config(scheduler={"max_num_seqs": 4, "max_model_len": 100})
    assert plan(SMALL, config, 80 * GIB).num_blocks == 4 * 7 + 1
    assert plan(SMALL, config, None).num_blocks == 4 * 7 + 1
    assert choose_num_blocks(make_config(cache={"num_blocks": 500}).cache, 29, 100) == 500


def test_longest_request_is_what_the_cache_or_the_model_allows() -> None:
    result = plan(SMALL, make_config(cache={"num_blocks": 11}), 80 * GIB)
    assert (result.problem, result.max_model_len, result.longest_request) == (None, 8192, 160)
    roomy = plan(SMALL, make_config(cache={"num_blocks": 1000}), 80 * GIB)
    assert (roomy.max_model_len, roomy.longest_request) == (8192, 8192)


def test_weights_that_leave_no_room() -> None:
    config = make_config(tensor_parallel_size=2)
    result = plan(make_spec(), config, 6 * GIB)
    assert result.problem is not None
    for part in (
        "shard 0",
        "0.9 of 6.00 GiB",
        "tensor_parallel_size=2",
        "up to 32",
        "cache.memory_fraction=0.9",
    ):
        assert part in result.problem
    with pytest.raises(ConfigError, match="leaves no room"):
        result.require_fit()


def test_too_many_blocks_names_the_most_that_fit() -> None:
    automatic = plan(make_spec(), make_config(), 16 * GIB)
    most = automatic.num_blocks
    assert plan(make_spec(), make_config(cache={"num_blocks": most}), 16 * GIB).problem is None
    result = plan(make_spec(), make_config(cache={"num_blocks": most + 1}), 16 * GIB)
    assert result.problem is not None
    assert f"cache.num_blocks={most + 1}" in result.problem
    assert f"lower cache.num_blocks to {most} or less" in result.problem
    assert plan(make_spec(), make_config(cache={"num_blocks": most + 1}), None).problem is None


def test_a_request_longer_than_the_cache() -> None:
    config = {"scheduler": {"max_model_len": 161}, "cache": {"num_blocks": 11}}
    result = plan(SMALL, make_config(**config), None)
    assert result.problem is not None
    for part in (
        "scheduler.max_model_len=161",
        "needs 12 blocks",
        "the cache has 11",
        "to 160 or less",
        "num_blocks to 12",
    ):
        assert part in result.problem
    assert (
        plan(SMALL, make_config(scheduler={"max_model_len": 160}, cache={"num_blocks": 11}), None).problem
        is None
    )


def test_a_request_longer_than_the_model_allows() -> None:
    result = plan(SMALL, make_config(scheduler={"max_model_len": 8193}), 80 * GIB)
    assert result.problem is not None
    assert "8193" in result.problem
    assert "8192" in result.problem


def test_memory_for_the_wrong_number_of_devices() -> None:
    with pytest.raises(ConfigError, match=r"3 devices.*tensor_parallel_size=2"):
        plan(SMALL, make_config(tensor_parallel_size=2), [GIB] * 3)


def test_json_values() -> None:
    values = plan(SMALL, make_config(tensor_parallel_size=2, cache={"num_blocks": 4}), None, "cpu").as_dict()
    assert values["fits"] is True
    assert values["num_tokens"] == 48
    first = values["shards"][0]
    assert first["total_bytes"] == first["weight_bytes"] + first["kv_bytes"] + first["reserve_bytes"]


def test_layers_with_a_window_may_have_a_rotary_table_of_their_own() -> None:
    config = make_config(scheduler={"max_model_len": 1000})
    local = RotarySpec(theta=1e4, rotary_dim=128)
    windowed = make_spec(layer_windows=(64,) * 18 + (None,) * 18)
    shard_map = ShardMap.build(windowed.dims, 1)
    one_table = reserve_bytes(config, windowed, shard_map, "cpu")
    two_tables = reserve_bytes(config, dataclasses.replace(windowed, window_rotary=local), shard_map, "cpu")
    assert two_tables - one_table == 1000 * 2 * 128 * 4


GEMMA = make_spec(  # sizes of Gemma 3 4B's layers
    num_layers=34,
    num_q_heads=8,
    num_kv_heads=4,
    head_dim=256,
    max_position_embeddings=131072,
    layer_windows=tuple(None if layer % 6 == 5 else 1024 for layer in range(34)),
)


@pytest.mark.parametrize("memory", [None, 16, 80])
@pytest.mark.parametrize("world_size", [1, 3])
def test_layer_groups(memory: int | None, world_size: int) -> None:
    """The window group has what 64 + 8 rows and a chunk can fill, or as many blocks as the rest."""
    config = make_config(
        tensor_parallel_size=world_size, scheduler={"max_num_seqs": 64, "max_num_batched_tokens": 2048}
    )
    result = plan(GEMMA, config, None if memory is None else memory * GIB)
    assert result.problem is None
    full, windowed = result.groups
    assert (full.window, full.num_layers, windowed.window, windowed.num_layers) == (None, 5, 1024, 29)
    most = 72 * (1024 // 16 + 1) + 2048 // 16 + 1
    assert windowed.num_blocks == min(most, full.num_blocks)
    assert full.num_blocks == result.num_blocks
    for shard in result.shards:
        layer_block = 16 * 2 * shard.num_kv_heads * 256 * 2
        assert shard.kv_bytes == layer_block * (5 * full.num_blocks + 29 * windowed.num_blocks)
    if memory is None:
        assert full.num_blocks == 64 * (131072 // 16) + 1
    else:
        # Not one block more would fit.
        one_more = 5 + (29 if full.num_blocks < most else 0)
        assert any(
            shard.total_bytes + one_more * 16 * 2 * shard.num_kv_heads * 256 * 2 > shard.usable_bytes
            for shard in result.shards
            if shard.usable_bytes is not None
        )
    assert (windowed.num_blocks < full.num_blocks) == ((memory, world_size) != (16, 1))


def test_a_window_everywhere_bounds_the_cache() -> None:
    spec = make_spec(num_layers=2, layer_windows=(64, 64))
    config = make_config(scheduler={"max_num_seqs": 8, "max_num_batched_tokens": 64})
    result = plan(spec, config, 80 * GIB)
    assert (result.num_blocks, result.longest_request) == (9 * 5 + 4 + 1, 40960)
    small = plan(spec, make_config(cache={"num_blocks": 5}), 80 * GIB)
    assert (small.problem, small.longest_request) == (None, 64)
    too_small = make_config(cache={"num_blocks": 5}, scheduler={"max_model_len": 1000})
    problem = plan(spec, too_small, 80 * GIB).problem
    assert problem is not None
    assert "needs 6 blocks of 16" in problem
    assert "max_model_len to 64 or less" in problem

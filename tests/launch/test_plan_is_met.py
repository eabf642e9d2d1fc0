"""What the plan says before anything is loaded is what running shards hold, to the byte."""

from pathlib import Path
from typing import Any

import pytest
from family_models import make_family_model
from models_factory import make_gguf, make_llama, make_model

from kvshard.launch.in_process import InProcessExecutor
from kvshard.launch.local import LocalLauncher
from kvshard.parallel.shard_map import ShardMap
from kvshard.runtime.config import parse_config
from kvshard.runtime.coordinator.executor import Executor
from kvshard.runtime.coordinator.remote import CacheSize, RemoteExecutor
from kvshard.runtime.models.checkpoint_index import read_index
from kvshard.runtime.observe.memory_plan import plan_memory

CASES: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (1, {"tie_word_embeddings": True}, {}),
    (1, {}, {"dtype": "bfloat16"}),
    (2, {"tie_word_embeddings": True}, {"shard_weights": [3, 1]}),
    (2, {}, {"dtype": "bfloat16", "cache": {"num_blocks": 7, "block_size": 32}}),
    (4, {"num_key_value_heads": 2}, {"cache": {"num_blocks": 11}}),
    (5, {"num_key_value_heads": 1, "intermediate_size": 100}, {"cache": {"num_blocks": 2}}),
    (1, {}, {"cache": {"dtype": "int8"}}),
    (1, {}, {"dtype": "bfloat16", "cache": {"dtype": "fp8", "num_blocks": 7}}),
    (2, {}, {"cache": {"dtype": "int4", "num_blocks": 11}}),
    (1, {"head_dim": 32, "tie_word_embeddings": True}, {"quantization": "int8", "dtype": "bfloat16"}),
    (2, {"intermediate_size": 100}, {"quantization": "int4"}),  # o and down stay numbers
]


@pytest.mark.parametrize(("size", "model", "settings"), CASES)
def test_shards_hold_what_was_planned(
    size: int, model: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    check_plan(make_llama(tmp_path, **model), size, settings)


@pytest.mark.parametrize(("case", "size"), [("gemma3", 1), ("qwen2_windows", 2), ("olmo2", 3)])
def test_plans_of_other_families_are_met(case: str, size: int, tmp_path: Path) -> None:
    make_family_model(case).save_pretrained(tmp_path)
    check_plan(tmp_path, size, {"dtype": "bfloat16"})


def test_blocks_that_are_kept(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "model.gguf", make_model(head_dim=32), "Q4_1")
    check_plan(path, 1, {"quantization": "keep"})


def check_plan(path: Path, size: int, settings: dict[str, Any]) -> None:
    values = {"model": str(path), "tensor_parallel_size": size, "device": "cpu", "dtype": "float32"}
    config = parse_config(values | {"scheduler": {"max_model_len": 32}} | settings, "test")
    index = read_index(path)
    shard_map = ShardMap.build(index.spec.dims, size, config.shard_weights)
    formats = index.weight_formats(config.quantization)
    plan = plan_memory(config, index.spec, shard_map, "cpu", 2**30, formats)
    cache_size = CacheSize(plan.num_blocks, plan.max_model_len)
    executor: Executor
    if size == 1:
        executor = InProcessExecutor(config, str(path), cache_size)
    else:
        executor = RemoteExecutor(LocalLauncher(size), config, str(path), lambda _: cache_size)
    try:
        shards = executor.start()
    finally:
        executor.close()
    assert len(shards) == size
    for planned, held in zip(plan.shards, shards, strict=True):
        assert held.num_layer_blocks == sum(group.num_layers * group.num_blocks for group in plan.groups)
        assert held.weight_bytes == planned.weight_bytes
        assert held.kv_bytes == planned.kv_bytes
        assert (held.num_q_heads, held.num_kv_heads) == (planned.num_q_heads, planned.num_kv_heads)

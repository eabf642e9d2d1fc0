"""A context of 128k tokens: the answer, and a cache that follows its formula and the windows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alone import make_word_model, open_llm
from family_models import make_family_model

from kvshard.launch.in_process import InProcessExecutor
from kvshard.parallel.shard_map import ShardMap
from kvshard.runtime.config import parse_config
from kvshard.runtime.coordinator.limits import Limits
from kvshard.runtime.coordinator.loop import Coordinator
from kvshard.runtime.coordinator.remote import CacheSize
from kvshard.runtime.coordinator.request import Request
from kvshard.runtime.models.checkpoint_index import read_index
from kvshard.runtime.observe.memory_plan import plan_memory
from kvshard.runtime.sampling_params import SamplingParams

LONGEST = 128 * 1024
WINDOW, BLOCK_SIZE, CHUNK, NUM_NEW = 64, 16, 2048, 40
SIZES = {"sliding_window": WINDOW, "max_position_embeddings": LONGEST}
NUM_WINDOW_BLOCKS = 2 * (WINDOW // BLOCK_SIZE + 1) + CHUNK // BLOCK_SIZE + 1  # one row, and a prefix's share


def _run(path: Path, prompt: list[int]) -> tuple[Coordinator, Request, InProcessExecutor, Any]:
    values = {
        "model": str(path),
        "device": "cpu",
        "dtype": "float32",
        "cache": {"block_size": BLOCK_SIZE},
        "scheduler": {"max_num_seqs": 1, "max_num_batched_tokens": CHUNK},
    }
    config = parse_config(values, "test")
    spec = read_index(path).spec
    plan = plan_memory(config, spec, ShardMap.build(spec.dims, 1), "cpu", 4 * 2**30)
    plan.require_fit()
    assert plan.longest_request == LONGEST
    executor = InProcessExecutor(config, str(path), CacheSize(plan.num_blocks, plan.max_model_len))
    [held] = executor.start()
    assert held.kv_bytes == plan.shards[0].kv_bytes
    limits = Limits.from_config(
        config,
        num_blocks=plan.num_blocks,
        max_model_len=plan.max_model_len,
        layer_groups=spec.layer_groups,
    )
    coordinator = Coordinator(executor, limits)
    request = Request.new("long", prompt, SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True))
    coordinator.add(request)
    while coordinator.has_work:
        coordinator.step()
    assert request.num_tokens == LONGEST
    return coordinator, request, executor, plan


def _prompt() -> list[int]:
    return np.random.default_rng(0).integers(3, 101, LONGEST - NUM_NEW).tolist()


def test_windows_only(tmp_path: Path) -> None:
    model = make_family_model("mistral", **SIZES)
    model.save_pretrained(tmp_path)
    coordinator, request, executor, plan = _run(tmp_path, _prompt())
    assert [(g.window, g.num_layers, g.num_blocks) for g in plan.groups] == [(WINDOW, 2, NUM_WINDOW_BLOCKS)]
    assert executor.worker is not None
    # 2 layers of K and V, 2 heads of 16 channels in float32
    assert executor.worker.cache.num_bytes == NUM_WINDOW_BLOCKS * BLOCK_SIZE * 2 * 2 * 2 * 16 * 4
    num_row = WINDOW // BLOCK_SIZE + 1 + CHUNK // BLOCK_SIZE
    assert 0 < coordinator.stats.peak_used_layer_blocks <= 2 * num_row
    check_tokens(model, request.prompt_token_ids, request.output_token_ids)


def check_tokens(model: Any, prompt: list[int], output: list[int]) -> None:
    """Two layers with a window see 2 * (WINDOW - 1) tokens back: so far transformers reads, at the same positions."""
    num_seen = 2 * WINDOW + NUM_NEW
    tokens = torch.tensor([(prompt + output)[-num_seen:]])
    positions = torch.arange(LONGEST - num_seen, LONGEST)[None]
    with torch.inference_mode():
        logits = model(tokens, position_ids=positions).logits[0]
    assert logits[-NUM_NEW - 1 : -1].argmax(-1).tolist() == output


@pytest.mark.slow
def test_full_attention_beside_windows(tmp_path: Path) -> None:
    model = make_family_model(
        "qwen2_windows",
        **SIZES,
        num_attention_heads=3,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    model.save_pretrained(tmp_path)
    coordinator, _, executor, plan = _run(tmp_path, _prompt())
    num_full = LONGEST // BLOCK_SIZE + 1
    assert [(g.window, g.num_layers, g.num_blocks) for g in plan.groups] == [
        (None, 1, num_full),
        (WINDOW, 1, NUM_WINDOW_BLOCKS),
    ]
    assert executor.worker is not None
    num_blocks = num_full + NUM_WINDOW_BLOCKS
    assert executor.worker.cache.num_bytes == num_blocks * BLOCK_SIZE * 2 * 16 * 4
    num_used = coordinator.stats.peak_used_layer_blocks
    num_row = WINDOW // BLOCK_SIZE + 1 + CHUNK // BLOCK_SIZE
    assert num_full - 1 < num_used <= num_full - 1 + num_row


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "cache_dtype", "kv_heads", "row_bytes"),
    [(5, "auto", [1, 1, 2, 1, 1], 4 * 16), (3, "int8", [1, 2, 1], 16 + 2)],
)
def test_windows_only_on_shards(
    size: int, cache_dtype: str, kv_heads: list[int], row_bytes: int, tmp_path: Path
) -> None:
    """Six heads of 16 channels in two groups."""
    model = make_word_model(tmp_path, "mistral", **SIZES)
    prompt = _prompt()
    with open_llm(
        model,
        size,
        cache={"dtype": cache_dtype, "block_size": BLOCK_SIZE},
        scheduler={"max_num_seqs": 1, "max_num_batched_tokens": CHUNK},
    ) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
        [output] = llm.generate({"prompt_token_ids": prompt}, sampling)
        shards = llm._engine.shards
        num_used = llm._engine.coordinator.stats.peak_used_layer_blocks
    assert len(output.outputs[0].token_ids) == NUM_NEW
    if cache_dtype == "auto":
        check_tokens(make_family_model("mistral", **SIZES), prompt, output.outputs[0].token_ids)
    one_head = NUM_WINDOW_BLOCKS * BLOCK_SIZE * 2 * 2 * row_bytes  # 2 layers of K and V
    assert [shard.kv_bytes for shard in shards] == [count * one_head for count in kv_heads]
    assert num_used <= 2 * (WINDOW // BLOCK_SIZE + 1 + CHUNK // BLOCK_SIZE)

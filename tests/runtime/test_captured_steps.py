"""Steps through buckets of rows, as a GPU replays them. There are no CUDA graphs here, so a replay is a call of what would
have been captured: on tensors that stay in their place, with idle rows."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from decoder_ranks import BLOCK_SIZE, make_worker, plan
from family_models import make_family_model
from models_factory import make_llama
from torch import Tensor

from kvshard.parallel.group import Group
from kvshard.runtime.errors import ConfigError
from kvshard.runtime.shard import captured_steps
from kvshard.runtime.shard.buckets import CHUNK, buckets, max_context, planned_context
from kvshard.runtime.shard.captured_steps import CapturedSteps, GraphPool, Step
from kvshard.runtime.shard.recorded_steps import RecordedSteps
from kvshard.runtime.shard.worker import Worker

# Rows of each step: prompts, then buckets of 4, 2 and 1, some with idle rows; a row that brings two tokens; and 4, 4 and 8.
STEPS = [(0, 1, 2, 3, 4), (0, 2, 3), (1, 4), (3,), (0, 1, 2, 3, 4), (4, 0, 2, 1), (1, 3, 4), (2, 0, 1, 4, 3)]
TWO_TOKENS = 4  # the step in which the first row has two
BUCKETS = [4, 2, 1, 4, 4, 8]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model") / "llama")


def same_call(step: Step) -> Step:
    step()  # as a capture does, on rows that are all idle
    return step


def capture(worker: Worker) -> CapturedSteps:
    return CapturedSteps(
        worker.decoder,
        worker.cache,
        num_groups=len(worker.spec.layer_groups),
        max_num_seqs=8,
        max_model_len=64,
        block_size=BLOCK_SIZE,
        capture=same_call,
    )


def as_they_come(path: Path, cache_dtype: str = "auto") -> list[Tensor]:
    """The logits of each step, with nothing captured or recorded."""
    worker = make_worker(path, Group.single("cpu"), cache_dtype=cache_dtype)
    steps = worker._steps
    assert isinstance(steps, RecordedSteps)
    steps._step = None
    return run(worker, steps)


def run(worker: Worker, steps: CapturedSteps | RecordedSteps) -> list[Tensor]:
    """The logits of each step."""
    chance = np.random.default_rng(1)
    prompts = [chance.integers(3, 100, length).tolist() for length in (3, 9, 4, 1, 6)]
    free = [chance.permutation(np.arange(1, num)).tolist() for num in worker.cache.group_blocks]
    tables = {i: tuple(tuple(ids.pop() for _ in range(6)) for ids in free) for i in range(len(prompts))}
    logits = []
    for step, slots in enumerate(STEPS):
        lengths = [1 + (step == TWO_TOKENS and i == 0) for i in range(len(slots))]
        rows = [
            (slot, prompts[slot] if step == 0 else chance.integers(3, 100, length).tolist())
            for slot, length in zip(slots, lengths, strict=True)
        ]
        with torch.inference_mode():
            hidden = steps.forward(worker.slots.apply(plan(step, rows, {} if step else tables)))
            logits.append(worker.decoder.logits(hidden).clone())
    return logits


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_windows"])
@pytest.mark.parametrize("cache_dtype", ["auto", "int4"])
def test_logits_are_those_of_steps_as_they_come(
    name: str, cache_dtype: str, llama: Path, tmp_path: Path
) -> None:
    path = llama
    if name != "llama":
        path = tmp_path / name
        make_family_model(name).save_pretrained(path)
    expected = as_they_come(path, cache_dtype)
    worker = make_worker(path, Group.single("cpu"), cache_dtype=cache_dtype)  # NaN where nothing is written
    steps = capture(worker)
    replay = captured_steps._Bucket.replay
    with mock.patch.object(captured_steps._Bucket, "replay", autospec=True, side_effect=replay) as replayed:
        got = run(worker, steps)
    assert [call.args[0].num_rows for call in replayed.call_args_list] == BUCKETS
    assert all(x.isfinite().all() for x in got)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("forgotten", ["token_ids", "positions", "slots", "context_lens", "block_tables"])
def test_each_input_counts(forgotten: str, llama: Path) -> None:
    """A replay reads what the step has written to each tensor."""
    expected = as_they_come(llama)
    worker = make_worker(llama, Group.single("cpu"))
    steps = capture(worker)
    for bucket in steps._buckets:
        inputs, meta = bucket._inputs, bucket._inputs.attention[0]
        stale = {
            "token_ids": (inputs.token_ids, 0),
            "positions": (inputs.positions, 0),
            "slots": (inputs.slot_mappings[0], -1),
            "context_lens": (meta.context_lens, 1),
            "block_tables": (meta.block_tables, 0),
        }

        def replay(kept: tuple[Tensor, int] = stale[forgotten], step: Step = bucket._replay) -> Tensor:
            kept[0].fill_(kept[1])
            return step()

        bucket._replay = replay
    assert not all(torch.equal(a, b) for a, b in zip(expected, run(worker, steps), strict=True))


def test_idle_rows_store_nothing(llama: Path) -> None:
    worker = make_worker(llama, Group.single("cpu"), poison=False)
    worker.cache.fill(0.0)
    steps = capture(worker)
    tables = {slot: ((1 + slot,),) for slot in range(3)}
    with torch.inference_mode():
        steps.forward(worker.slots.apply(plan(0, [(slot, [5]) for slot in range(3)], tables)))
    for layer in worker.cache.layers:
        written = layer.k.flatten(1).abs().sum(1) > 0
        assert written.nonzero().flatten().tolist() == [1, 2, 3]


def test_rows_too_long_run_as_they_come(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_steps, "max_context", lambda num_rows, max_model_len: 4)
    worker = make_worker(llama, Group.single("cpu"))
    steps = capture(worker)
    replay = captured_steps._Bucket.replay
    with (
        torch.inference_mode(),
        mock.patch.object(captured_steps._Bucket, "replay", autospec=True, side_effect=replay) as replayed,
    ):
        steps.forward(worker.slots.apply(plan(0, [(0, [5, 6, 7])], {0: ((1, 2),)})))
        for step, count in ((1, 1), (2, 1)):  # of 4 tokens, then of 5
            steps.forward(worker.slots.apply(plan(step, [(0, [8])], {})))
            assert replayed.call_count == count


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("longest", [1, 64, 511, 512, 513, 4096])
def test_windows_reach_into_as_many_chunks_as_were_planned(longest: int, block_size: int) -> None:
    """The GPU's work lists are made once for the longest rows; with a window another length may need one more chunk."""
    pytest.importorskip("triton")
    from kvshard.kernels.metadata import AttentionMetadata
    from kvshard.kernels.tiles import attention_tiles
    from kvshard.kernels.triton.plan import plan_work, refill_work

    tiles = attention_tiles(64, "auto", 2)
    chunk = tiles.decode.chunk
    assert CHUNK % chunk == 0
    planned = planned_context(longest)
    table = torch.zeros(2, -(-planned // block_size), dtype=torch.int32)
    ones = np.ones(2, np.int32)
    lengths = (1, 2, chunk - 1, chunk, chunk + 1, 2 * chunk, 3000, longest)
    for window in (None, 1, 2, chunk, chunk + 1, 1000):
        meta = AttentionMetadata.build(ones, np.full(2, planned, np.int32), table, block_size, "cpu")
        plans = plan_work(meta, tiles, 4, window)
        for length in filter(lambda length: length <= longest, lengths):
            meta.refill(np.array([length, 1], np.int32), table[:1])
            refill_work(plans, meta, tiles, 4, window)


def test_many_rows_are_planned_for_fewer_chunks() -> None:
    assert [max_context(rows, 131072) for rows in (1, 16, 256, 4096)] == [131072, 65536, 4096, 512]
    assert max_context(16, 2048) == 2048


def test_buckets() -> None:
    assert buckets(1) == [1]
    assert buckets(3) == [1, 2, 3]
    assert buckets(16) == [1, 2, 4, 8, 16]
    assert buckets(40) == [1, 2, 4, 8, 16, 32, 40]


@pytest.mark.parametrize(
    ("changes", "world_size"), [({"cuda_graphs": False}, 1), ({}, 2)], ids=["switched off", "two shards"]
)
def test_where_nothing_is_captured(
    changes: dict[str, bool], world_size: int, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(llama, Group.single("cpu"))
    worker.device = torch.device("cuda")
    worker.group.world_size = world_size
    worker._config = worker._config.model_copy(update=changes)
    monkeypatch.setattr(GraphPool, "__init__", lambda self: pytest.fail("something is captured"))
    assert isinstance(worker._make_steps(1), RecordedSteps)


def test_what_cannot_be_captured_names_the_setting(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker(llama, Group.single("cpu"))
    worker.device = torch.device("cuda")

    def no_graph(self: GraphPool, step: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(GraphPool, "__init__", lambda self: None)
    monkeypatch.setattr(GraphPool, "capture", no_graph)
    with pytest.raises(ConfigError, match=r"not permitted when stream is capturing.*set cuda_graphs: false"):
        worker._make_steps(1)

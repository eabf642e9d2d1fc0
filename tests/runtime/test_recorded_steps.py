"""Played steps have the bits of those that run through Python, on one shard and on several."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from decoder_ranks import decode, decode_steps, make_worker, plan
from family_models import make_family_model
from models_factory import make_llama
from ranks import connect, run_ranks
from tolerances import assert_within
from torch.distributed import Store

from kvshard.kernels.cpu import linear
from kvshard.kernels.cpu.tape import Tape
from kvshard.parallel.group import Group, GroupError
from kvshard.runtime.shard import recorded_steps
from kvshard.runtime.shard.slots import StepInputs

NUM_PLAYED = 11  # all steps of `decode_steps`


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model") / "llama")


def family(name: str, folder: Path) -> Path:
    make_family_model(name).save_pretrained(folder / name)
    return folder / name


@pytest.mark.parametrize("cache_dtype", ["auto", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_shard(dtype: str, cache_dtype: str, llama: Path) -> None:
    plain, none = decode_steps(Group.single("cpu"), llama, False, dtype, cache_dtype)
    played, num_played = decode_steps(Group.single("cpu"), llama, True, dtype, cache_dtype)
    assert (none, num_played) == (0, NUM_PLAYED)
    for step, (a, b) in enumerate(zip(plain, played, strict=True)):
        assert torch.equal(a, b), f"step {step}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_weights(dtype: str, llama: Path) -> None:
    """Codes are widened in C, so steps are played; and what is played is not what other weights give."""
    plain, _ = decode_steps(Group.single("cpu"), llama, False, dtype, quantization="int8")
    played, num_played = decode_steps(Group.single("cpu"), llama, True, dtype, quantization="int8")
    assert num_played == NUM_PLAYED
    assert all(torch.equal(a, b) for a, b in zip(plain, played, strict=True))
    wide, _ = decode_steps(Group.single("cpu"), llama, True, dtype)
    assert not any(torch.equal(a, b) for a, b in zip(wide, played, strict=True))


@pytest.mark.parametrize("name", ["qwen2_windows", "qwen3", "gemma2", "gemma3", "phi3"])
def test_families(name: str, tmp_path: Path) -> None:
    path = family(name, tmp_path)
    plain, _ = decode_steps(Group.single("cpu"), path, recorded=False)
    played, num_played = decode_steps(Group.single("cpu"), path)
    assert num_played == NUM_PLAYED
    assert all(torch.equal(a, b) for a, b in zip(plain, played, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_packed_weights_are_those_of_the_model(tied: bool, dtype: str, tmp_path: Path) -> None:
    """Packed in place, and one of them may be the embedding too: near plain ones in float32."""
    path = make_llama(tmp_path, tie_word_embeddings=tied)
    with mock.patch.object(linear, "can_pack", return_value=False):
        exact, _ = decode_steps(Group.single("cpu"), path)
    got, num_played = decode_steps(Group.single("cpu"), path, dtype=dtype)
    assert num_played == NUM_PLAYED
    operation = "logits" if dtype == "float32" else "logits in bfloat16"
    for a, b in zip(exact, got, strict=True):
        assert_within(b, a, operation)
        with pytest.raises(AssertionError, match="not close"):
            assert_within(b, a.roll(1, 0), operation)


def test_a_family_in_which_torch_computes_runs_as_it_comes(tmp_path: Path) -> None:
    path = family("olmo2", tmp_path)
    plain, _ = decode_steps(Group.single("cpu"), path, recorded=False)
    others, num_played = decode_steps(Group.single("cpu"), path)
    assert num_played == 0
    assert all(torch.equal(a, b) for a, b in zip(plain, others, strict=True))


@pytest.mark.parametrize(("world_size", "dtype"), [(2, "float32"), (3, "float32"), (2, "bfloat16")])
def test_several_shards(world_size: int, dtype: str, llama: Path) -> None:
    plain = run_ranks(decode, world_size, llama, False, dtype)
    played = run_ranks(decode, world_size, llama, True, dtype)
    for (expected, none), (got, num_played) in zip(plain, played, strict=True):
        assert (none, num_played) == (0, NUM_PLAYED)
        assert all(np.array_equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("float32", 32), ("bfloat16", 32), ("bfloat16", 24), ("float16", 32)]
)
def test_steps_longer_than_what_is_recorded(dtype: str, head_dim: int, tmp_path: Path) -> None:
    """Products of more than 64 tokens are torch's where that is fast and weights are not packed: their steps run as they
    come."""
    linear._fast_in_torch.cache_clear()  # to be asked while a step is noted
    path = make_llama(tmp_path, head_dim=head_dim)
    results: list[list[torch.Tensor]] = []
    for recorded in (True, False):
        worker = make_worker(path, Group.single("cpu"), dtype=dtype, max_num_batched_tokens=128)
        step = worker._steps._step
        assert step is not None
        packed = worker.decoder._layers[0].o.weight.packed  # if this one is, all are
        most = 128 if packed or not linear._fast_in_torch(getattr(torch, dtype)) else 64
        assert step._tape.num_tokens == most
        if not recorded:
            worker._steps._step = None
        tables = {slot: (tuple(range(1 + 16 * slot, 17 + 16 * slot)),) for slot in range(3)}
        chance, hidden = np.random.default_rng(3), []
        with (
            torch.inference_mode(),
            mock.patch.object(Tape, "play", autospec=True, side_effect=Tape.play) as play,
        ):
            for number, lengths in enumerate(([50, 40, 30], [1, 1, 1], [2, 1, 20], [1, 1])):
                rows = [(slot, chance.integers(3, 100, n).tolist()) for slot, n in enumerate(lengths)]
                inputs = worker.slots.apply(plan(number, rows, {} if number else tables))
                hidden.append(worker._steps.forward(inputs).clone())
        assert play.call_count == recorded * (3 + (most == 128))
        results.append(hidden)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert [len(x) for x in results[0]] == [120, 3, 23, 2]


@pytest.mark.parametrize(
    "stale", ["token_ids", "positions", "slot_mappings", "query_start", "context_lens", "block_tables"]
)
def test_each_input_counts(stale: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input that only the first play is given shows."""
    plain, _ = decode_steps(Group.single("cpu"), llama, recorded=False)
    play = recorded_steps._Step.play
    first: list[torch.Tensor] = []

    def forget(step: recorded_steps._Step, inputs: StepInputs) -> torch.Tensor:
        places = step._places
        place = {
            "token_ids": places.token_ids,
            "positions": places.positions,
            "slot_mappings": places.slot_mappings[0],
            "query_start": places.attention[0].query_start,
            "context_lens": places.attention[0].context_lens,
            "block_tables": places.attention[0].block_tables,
        }[stale]
        first.append(place.clone())
        place.copy_(first[0])
        return play(step, inputs)

    monkeypatch.setattr(recorded_steps._Step, "play", forget)
    played, num_played = decode_steps(Group.single("cpu"), llama)
    assert num_played == NUM_PLAYED
    assert torch.equal(plain[0], played[0])
    assert not all(torch.equal(a, b) for a, b in zip(plain, played, strict=True))


def leave(store: Store, rank: int, world_size: int, path: Path) -> tuple[str, int] | None:
    group = connect(store, rank, world_size)
    worker = make_worker(path, group)
    tables = {0: tuple(tuple(range(1, 7)) for _ in worker.cache.group_blocks)}
    with torch.inference_mode():
        for step in range(4):
            worker._steps.forward(worker.slots.apply(plan(step, [(0, [5])], {} if step else tables)))
        begun = group._transport.sequence  # type: ignore[union-attr]
        if rank == 1:
            group.abort("enough")
            return None
        with pytest.raises(GroupError) as caught:
            worker._steps.forward(worker.slots.apply(plan(4, [(0, [5])], {})))
    assert "enough" in str(caught.value)
    return caught.value.where, caught.value.sequence - begun


def test_a_play_that_a_rank_has_left_says_where(llama: Path) -> None:
    told, _ = run_ranks(leave, 2, llama)
    assert told == ("embedding", 1)

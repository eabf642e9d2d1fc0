"""The same tokens and logprobs, bit for bit, for every number of ranks and every company in the batch."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from thread_ranks import PATIENCE_S, ThreadGroup, run_on_threads, uneven_shares
from torch import Tensor
from torch.distributed import FileStore

from kvshard.parallel.group import Group
from kvshard.runtime.coordinator.logits_rules import LogitsRules
from kvshard.runtime.coordinator.plan import NO_TOKEN, SlotSampling
from kvshard.runtime.shard.sampler import Sampler

CPU = torch.device("cpu")
VOCAB_SIZE = 1003


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(**changes: Any) -> SlotSampling:
    values = {"temperature": 0.9, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 77, "logprobs": 0}
    return SlotSampling(**{**values, "stop_ids": (), "stop_from": 0, **changes})


CHANGES = LogitsRules(
    presence_penalty=0.5,
    frequency_penalty=0.2,
    repetition_penalty=1.3,
    logit_bias=((0, 4.0), (77, -3.0), (1002, 6.0)),
    bad_words=((5,), (8, 6), (9, 8, 7), (9, 8, 1002)),
    prompt_ids=(3, 4, 500),
    output_ids=(*range(0, 1003, 5), 9, 8),
)

KINDS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "stop_ids": (0, 1, 500, 1002), "stop_from": 1000},
    {"logprobs": 20},
    {"logprobs": 3},
    {},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 900},
    {"top_p": 0.3},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.8},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.01, "stop_ids": tuple(range(0, 1003, 7)), "stop_from": 1000},
    {"temperature": 0.0, "rules": CHANGES},
    {"top_k": 50, "rules": CHANGES},
]
SLOTS = [settings(**kind, seed=2**64 - 1 - index) for index, kind in enumerate(KINDS)]


def make_logits(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(len(SLOTS), VOCAB_SIZE, generator=generator) * 3
    return {
        "random": logits,
        "tied": logits.round(),
        "flat": torch.zeros_like(logits),
        "steep": logits * 30,
        "half precision": logits.bfloat16().float(),
        "broken": torch.where(torch.rand(logits.shape, generator=generator) < 3e-4, torch.nan, logits),
    }[kind]


def shares(world_size: int) -> list[range]:
    return uneven_shares(VOCAB_SIZE, world_size)


Result = tuple[list[int], list[list[tuple[int, int, int]]]]


def sample(
    group: Group | ThreadGroup,
    rows: range,
    logits: Tensor,
    slots: list[int],
    opened: list[SlotSampling] = SLOTS,
) -> Result:
    """Token ids and, as far as a row wants them, (token id, bits of the logprob, rank) of it and the most likely ones.

    Row i of `logits` belongs to slots[i], at position 100 + slot.
    """
    sampler = Sampler(group, rows, VOCAB_SIZE, len(opened), CPU)  # type: ignore[arg-type]
    for slot, sampling in enumerate(opened):
        sampler.open(slot, sampling)
    slot_array = np.array(slots, np.int32)
    positions = slot_array.astype(np.int64) + 100
    token_ids, table = sampler.sample(logits[:, rows.start : rows.stop].contiguous(), slot_array, positions)
    assert table is not None
    columns = table.token_ids.tolist(), table.logprobs.view(torch.int32).tolist(), table.ranks.tolist()
    wanted = [1 + (opened[slot].logprobs or 0) for slot in slots]
    places = [list(zip(*values, strict=True)) for values in zip(*columns, strict=True)]
    return token_ids.tolist(), [place[:count] for place, count in zip(places, wanted, strict=True)]


def on_threads(world_size: int, run: Callable[[ThreadGroup, range], Result]) -> list[Result]:
    return run_on_threads(world_size, lambda group: run(group, shares(world_size)[group.rank]))


EVERY_SLOT = list(range(len(SLOTS)))


def unsharded(logits: Tensor, slots: list[int], opened: list[SlotSampling] = SLOTS) -> Result:
    return sample(Group.single(CPU), range(VOCAB_SIZE), logits, slots, opened)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["random", "tied", "flat", "steep", "half precision", "broken"])
def test_every_rank_and_every_size_gives_the_same_bits(world_size: int, kind: str) -> None:
    logits = make_logits(kind)
    expected = unsharded(logits, EVERY_SLOT)
    broken = logits.isnan().any(1).tolist()
    assert [token == NO_TOKEN for token in expected[0]] == broken
    assert any(broken) == (kind == "broken")
    for result in on_threads(world_size, lambda group, rows: sample(group, rows, logits, EVERY_SLOT)):
        assert result == expected


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind))
def test_batches_of_one_kind_are_the_same_for_every_size(kind: dict[str, Any]) -> None:
    """These take the short cuts: stages that no row needs are left out."""
    logits = make_logits("tied")
    opened = [settings(**{"logprobs": 0 if index == 3 else None} | kind, seed=index) for index in EVERY_SLOT]
    expected = unsharded(logits, EVERY_SLOT, opened)
    for result in on_threads(3, lambda group, rows: sample(group, rows, logits, EVERY_SLOT, opened)):
        assert result == expected


def test_a_row_does_not_depend_on_the_batch() -> None:
    logits = make_logits("tied")
    tokens, logprobs = unsharded(logits, EVERY_SLOT)
    for slot in EVERY_SLOT:
        assert unsharded(logits[slot : slot + 1], [slot]) == ([tokens[slot]], [logprobs[slot]])
    for seed in range(5):
        slots = random.Random(seed).choices(EVERY_SLOT, k=seed * 5 + 2)
        expected = [tokens[slot] for slot in slots], [logprobs[slot] for slot in slots]
        assert unsharded(logits[slots], slots) == expected


@pytest.mark.parametrize("best", [4.0, -0.0])
def test_equal_logits_on_several_ranks_go_to_the_lowest_id(best: float) -> None:
    logits = torch.full((1, VOCAB_SIZE), -1.0)
    opened = [settings(temperature=0.0)]
    borders = [rows.start for rows in shares(5)]
    logits[0, borders[2:]] = abs(best)
    logits[0, borders[2]] = best
    results = on_threads(5, lambda group, rows: sample(group, rows, logits, [0], opened))
    assert [tokens for tokens, _ in results] == [[borders[2]]] * 5


def test_a_rank_with_other_vocabulary_rows_is_noticed() -> None:
    """The comparison above is not blind: noise for the wrong global ids gives other tokens."""
    logits = make_logits("random")
    right = unsharded(logits, EVERY_SLOT)[0]

    def shifted(group: ThreadGroup, rows: range) -> Result:
        if group.rank == 1:
            moved = torch.cat((logits[:, :1], logits), 1)  # the same columns, one id further
            return sample(group, range(rows.start + 1, rows.stop + 1), moved, EVERY_SLOT)
        return sample(group, rows, logits, EVERY_SLOT)

    assert on_threads(3, shifted)[0][0] != right


def run_in_process(rank: int, store_path: str) -> Result:
    group = Group.connect(
        FileStore(store_path, 2),
        rank=rank,
        world_size=2,
        epoch=0,
        job_id="test",
        device=CPU,
        host_id="host",
        timeout_s=PATIENCE_S,
        max_bytes=0,
    )
    result = sample(group, shares(2)[rank], make_logits("tied"), EVERY_SLOT)
    group.close()
    return result


def test_two_processes_give_the_same_bits(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=PATIENCE_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for output, errors in outputs:
        assert output.strip() == repr(unsharded(make_logits("tied"), EVERY_SLOT)), errors


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(run_in_process(int(sys.argv[2]), sys.argv[1]))

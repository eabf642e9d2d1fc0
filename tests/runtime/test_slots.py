"""A plan's slots become the inputs of a step: blocks come behind those that a table has, last tokens from the device."""

import numpy as np
import torch

from kvshard.runtime.coordinator.plan import OpenedSlot, SlotSampling, StepPlan
from kvshard.runtime.shard.slots import Slots

GREEDY = SlotSampling(0.0, 0, 1.0, 0.0, 1, None, (), 0)


def plan(
    rows: list[tuple[int, list[int] | None]],
    opened: tuple[OpenedSlot, ...],
    blocks: list[tuple[int, int, int]],
) -> StepPlan:
    """rows: (slot, its tokens, or None for the last one of the device); blocks: (slot, layer group, block)."""
    appended = np.array(blocks, np.int32).reshape(-1, 3)
    return StepPlan(
        epoch=0,
        step_id=0,
        closed_slots=np.empty(0, np.int32),
        opened=opened,
        appended_slots=appended[:, 0],
        appended_groups=appended[:, 1],
        appended_blocks=appended[:, 2],
        copied=(),
        row_slots=np.array([slot for slot, _ in rows], np.int32),
        row_num_new_tokens=np.array([1 if ids is None else len(ids) for _, ids in rows], np.int32),
        row_from_device=np.array([ids is None for _, ids in rows]),
        row_samples=np.ones(len(rows), np.bool_),
        token_ids=np.array([token for _, ids in rows for token in ids or ()], np.int32),
    )


def test_blocks_and_last_tokens() -> None:
    slots = Slots(
        num_groups=2,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        max_model_len=16,
        block_size=4,
        device=torch.device("cpu"),
    )
    opened = (OpenedSlot(3, 4, ((7,), (8,)), GREEDY), OpenedSlot(1, 0, ((), ()), GREEDY))
    blocks = [(3, 0, 9), (1, 0, 2), (3, 1, 5), (1, 1, 6), (1, 0, 4), (1, 1, 11)]
    first = slots.apply(plan([(1, [10, 11, 12, 13, 14]), (3, [20, 21, 22, 23])], opened, blocks))
    assert first.token_ids.tolist() == [10, 11, 12, 13, 14, 20, 21, 22, 23]
    assert first.positions.tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 7]
    assert first.slot_mappings[0].tolist() == [8, 9, 10, 11, 16, 36, 37, 38, 39]
    assert first.slot_mappings[1].tolist() == [24, 25, 26, 27, 44, 20, 21, 22, 23]
    assert [meta.block_tables.tolist() for meta in first.attention] == [[[2, 4], [7, 9]], [[6, 11], [8, 5]]]
    slots.store_sampled(first.sample_slots, torch.tensor([77, -1]))  # a broken row's reads as token 0

    second = slots.apply(plan([(3, None), (1, None)], (), [(3, 0, 1), (3, 1, 3)]))
    assert second.token_ids.tolist() == [0, 77]
    assert second.positions.tolist() == [8, 5]
    assert [mapping.tolist() for mapping in second.slot_mappings] == [[4, 17], [12, 45]]
    assert second.attention[0].query_start.tolist() == [0, 1, 2]
    assert second.attention[1].context_lens.tolist() == [9, 6]
    assert second.attention[1].block_tables[0].tolist() == [8, 5, 3]

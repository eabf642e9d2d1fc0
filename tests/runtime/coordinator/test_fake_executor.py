"""The simulated shards catch what they are there to catch: good plans, each spoilt in one way."""

import dataclasses
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from kvshard.runtime.coordinator.plan import StepPlan

replace = dataclasses.replace


def _spoil_opened(plan: StepPlan, **changes: object) -> StepPlan:
    if not plan.opened:
        return plan
    return replace(plan, opened=(replace(plan.opened[0], **changes), *plan.opened[1:]))


SPOILT: dict[str, tuple[Callable[[StepPlan], StepPlan], str]] = {
    "a step left out": (lambda plan: replace(plan, step_id=plan.step_id + 1), "gap in the steps"),
    "another epoch": (lambda plan: replace(plan, epoch=1), "gap in the steps"),
    "block 0": (lambda plan: _spoil_opened(plan, block_ids=((0, 1),)), "must not be given out"),
    "the next one's block": (lambda plan: _spoil_opened(plan, block_ids=((5, 6),)), "is given to"),
    "too few blocks": (lambda plan: _spoil_opened(plan, block_ids=((50,),)), "table is too short"),
    "a closed slot in use": (
        lambda plan: replace(plan, closed_slots=plan.row_slots[:1]) if not plan.opened else plan,
        "which is not open",
    ),
    "no close before an open": (
        lambda plan: replace(plan, closed_slots=plan.closed_slots[:0]),
        "is open already",
    ),
    "a token left out": (lambda plan: replace(plan, token_ids=plan.token_ids[:-1]), "too few token ids"),
    "a wrong token": (
        lambda plan: replace(plan, token_ids=plan.token_ids + np.int32(not plan.opened)),
        "not the token that was sampled",
    ),
    "a token the host knows": (
        lambda plan: plan if plan.opened else replace(plan, row_from_device=~plan.row_from_device),
        "the host knows this token",
    ),
    "a row twice": (lambda plan: replace(plan, row_slots=plan.row_slots * 0), "in two rows"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_plan(fake: ModuleType, name: str) -> None:
    spoil, message = SPOILT[name]
    run = fake.Run(fake.make_limits(max_num_seqs=2, run_ahead=0))
    submit = run.shards.submit
    run.shards.submit = lambda plan: submit(spoil(plan))
    run.add(*(fake.make_request(str(i), 6, max_tokens=4) for i in range(4)))
    with pytest.raises(AssertionError, match=message):
        run.to_the_end()


def test_a_foreign_block_changes_the_tokens(fake: ModuleType) -> None:
    """What is read is what counts: swapping two rows' cache contents gives other tokens."""
    run = fake.Run(fake.make_limits(run_ahead=0))
    rows = [fake.make_request(name, 6, max_tokens=8) for name in "ab"]
    run.add(*rows)
    run.step()
    first, second = (run.shards.slots[row.slot].tables[0][0] for row in rows)
    run.shards.caches[0][[first, second]] = run.shards.caches[0][[second, first]]
    run.to_the_end()
    for row in rows:
        assert row.output_token_ids != fake.expected(row, (), 200)[0]

"""Plans and results survive the trip as bytes."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshard.runtime.coordinator.logits_rules import LogitsRules
from kvshard.runtime.coordinator.logprobs import LogprobTable
from kvshard.runtime.coordinator.plan import (
    CopiedBlock,
    OpenedSlot,
    SlotSampling,
    StepPlan,
    StepResult,
    Targets,
    decode_plan,
    decode_result,
    encode_plan,
    encode_result,
)

int32 = st.integers(-(2**31), 2**31 - 1)
unit = st.floats(0, 1)


def int32s(size: int | None = None) -> st.SearchStrategy:
    lists = st.lists(int32, max_size=5) if size is None else st.lists(int32, min_size=size, max_size=size)
    return lists.map(lambda values: np.array(values, np.int32))


def bools(size: int) -> st.SearchStrategy:
    return st.lists(st.booleans(), min_size=size, max_size=size).map(
        lambda values: np.array(values, np.bool_)
    )


ids = st.lists(int32, max_size=4).map(tuple)
rules = st.builds(
    LogitsRules,
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.1, 10),
    logit_bias=st.lists(st.tuples(int32, st.floats(-100, 100)), max_size=3).map(tuple),
    allowed_token_ids=st.none() | ids,
    bad_words=st.lists(ids, max_size=3).map(tuple),
    prompt_ids=ids,
    output_ids=ids,
)
samplings = st.builds(
    SlotSampling,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**31 - 1),
    top_p=unit,
    min_p=unit,
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.none() | st.integers(0, 20),
    stop_ids=st.lists(int32, max_size=3).map(tuple),
    stop_from=st.integers(0, 2**31 - 1),
    sample_index=st.integers(0, 2**31 - 1),
    rules=st.none() | rules,
)
opened = st.builds(
    OpenedSlot,
    slot=int32,
    context_len=int32,
    block_ids=st.lists(st.lists(int32, max_size=4).map(tuple), max_size=3).map(tuple),
    sampling=samplings,
)


targets = st.integers(1, 3).flatmap(
    lambda count: st.builds(
        Targets, places=int32s(count), token_ids=int32s(count), num_top=st.integers(0, 20)
    )
)


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    num_rows, num_appended = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    return StepPlan(
        epoch=draw(st.integers(0, 2**40)),
        step_id=draw(st.integers(0, 2**40)),
        closed_slots=draw(int32s()),
        opened=tuple(draw(st.lists(opened, max_size=3))),
        appended_slots=draw(int32s(num_appended)),
        appended_groups=draw(int32s(num_appended)),
        copied=tuple(draw(st.lists(st.builds(CopiedBlock, int32, int32, int32), max_size=3))),
        appended_blocks=draw(int32s(num_appended)),
        row_slots=draw(int32s(num_rows)),
        row_num_new_tokens=draw(int32s(num_rows)),
        row_from_device=draw(bools(num_rows)),
        row_samples=draw(bools(num_rows)),
        token_ids=draw(int32s()),
        targets=draw(st.none() | targets),
    )


def assert_same(got: Any, sent: StepPlan | StepResult | LogprobTable | Targets) -> None:
    for field in dataclasses.fields(sent):
        before, after = getattr(sent, field.name), getattr(got, field.name)
        if isinstance(before, np.ndarray):
            assert after.dtype == before.dtype, field.name
            np.testing.assert_array_equal(after, before, err_msg=field.name)
        elif isinstance(before, LogprobTable | Targets):
            assert_same(after, before)
        else:
            assert after == before, field.name


@settings(max_examples=60, deadline=None)
@given(plans())
def test_plan_round_trip(plan: StepPlan) -> None:
    assert_same(decode_plan(encode_plan(plan)), plan)


TABLE = LogprobTable(
    np.array([[5, 7, 5], [2**31 - 1, 0, 1]], np.int32),
    np.array([[-0.5, -0.25, -0.5], [-np.inf, np.nan, 0]], np.float32),
    np.array([[2, 1, 2], [9, 1, 2]], np.int32),
)


@pytest.mark.parametrize("logprobs", [None, TABLE, TABLE.part(0, 2, 0), TABLE.part(1, 1, 2)])
def test_result_round_trip(logprobs: LogprobTable | None) -> None:
    result = StepResult(3, 2**33, np.array([5, -1, 2**31 - 1], np.int32), logprobs)
    got = decode_result(encode_result(result))
    assert_same(got, result)
    assert got.checksum() == result.checksum()
    other = dataclasses.replace(result, token_ids=np.array([5, -1, 0], np.int32))
    assert other.checksum() != result.checksum()
    with_prompts = dataclasses.replace(result, prompt_logprobs=TABLE)
    assert_same(decode_result(encode_result(with_prompts)), with_prompts)
    assert with_prompts.checksum() != result.checksum()

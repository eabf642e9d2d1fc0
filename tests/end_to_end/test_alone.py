"""The comparison that others rest on: what counts as a near-tie, and that nothing else is let through."""

import dataclasses
from typing import Any

import pytest
import torch
from alone import Alone, Choice, compare_logprobs, parts

from kvshard.launch.outputs import CompletionOutput, Logprob
from kvshard.runtime.coordinator.plan import SlotSampling

GREEDY = SlotSampling(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=3, logprobs=None, stop_ids=(), stop_from=0
)
ANSWER = CompletionOutput(
    index=0,
    text="w1 w0",
    token_ids=[1, 0],
    cumulative_logprob=-1.5,
    logprobs=[{1: Logprob(-1.0, 1, "w1")}, {0: Logprob(-0.5, 1, "w0")}],
    finish_reason="length",
    stop_reason=None,
)


def choice(logits: list[float], **changes: Any) -> Choice:
    return Choice(torch.tensor(logits), dataclasses.replace(GREEDY, **changes), 7)


@pytest.mark.parametrize(
    ("logits", "changes", "is_near"),
    [
        ([2.0, 2.0003, -1.0], {}, True),
        ([2.0, 2.01, -1.0], {}, False),
        ([2.0, 2.0, -torch.inf], {"temperature": 1e-5}, True),
        # Sampled from 5 and 5.01, of which one wins clearly; it would not if the third had a place among two.
        ([5.0, 5.01, 2.0, 1.0], {"temperature": 1.0, "top_k": 2}, False),
        ([0.0, 0.0002] * 20, {"temperature": 5.0, "top_k": 1}, True),
    ],
)
def test_near_ties(logits: list[float], changes: dict[str, Any], is_near: bool) -> None:
    assert choice(logits, **changes).hangs_on(5e-4) == is_near


@pytest.mark.parametrize(
    "changed",
    [
        {"token_ids": [1, 2]},
        {"token_ids": [1]},
        {"token_ids": [1, 0, 0]},
        {"text": "w1"},
        {"finish_reason": "stop"},
        {"stop_reason": "w0"},
    ],
    ids=str,
)
def test_what_differs_fails(changed: dict[str, Any]) -> None:
    alone = Alone(ANSWER, [choice([0.0, 1.0, 0.0]), choice([2.0, 1.0, 0.0])], None)
    assert not parts(ANSWER, alone, "auto")
    with pytest.raises(AssertionError):
        parts(dataclasses.replace(ANSWER, **changed), alone, "auto")


def test_a_token_at_a_near_tie_may_differ() -> None:
    alone = Alone(ANSWER, [choice([0.0, 1.0, 0.0]), choice([2.0, 1.0, 1.9999])], None)
    assert parts(dataclasses.replace(ANSWER, token_ids=[1, 2], text="w1 w2"), alone, "auto")


@pytest.mark.parametrize(
    "changed",
    [
        None,
        [None],
        [{1: Logprob(-1.0, 1, "w1")}, {0: Logprob(-0.5, 1, "w0")}],
        [None, {0: Logprob(-0.51, 1, "w0")}],
        [None, {0: Logprob(-0.5, 1, "w0"), 1: Logprob(-2.0, 2, "w1")}],
        [None, {}],
    ],
    ids=str,
)
def test_log_probabilities_that_differ_fail(changed: list[Any] | None) -> None:
    expected = [None, {0: Logprob(-0.5, 1, "w0")}]
    compare_logprobs([None, {0: Logprob(-0.50001, 1, "w0")}], expected, "auto")
    with pytest.raises((AssertionError, ValueError)):
        compare_logprobs(changed, expected, "auto")

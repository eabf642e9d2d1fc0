"""n answers to one prompt: each as if it ran alone, the prompt's full blocks held once."""

from types import ModuleType
from typing import Any

import pytest

from kvshard.runtime.coordinator.samples import Samples

BOTH = pytest.mark.parametrize("prefix_caching", [True, False])


def _samples(fake: ModuleType, n: int, num_prompt: int = 30, name: str = "a", **sampling: object) -> Samples:
    request = fake.make_request(name, num_prompt, n=n, **{"max_tokens": 8, **sampling})
    return Samples(request)


def _run(fake: ModuleType, *groups: Samples, **limits: int | bool) -> Any:
    run = fake.Run(fake.make_limits(**limits))
    for samples in groups:
        run.add(*samples.requests)
    run.to_the_end()
    for samples in groups:
        run.assert_as_expected(*samples.requests)
    return run


def _opened(run: Any) -> list[list[int]]:
    return [[opened.context_len for opened in plan.opened] for plan in run.shards.plans if plan.opened]


@BOTH
@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_the_prompts_full_blocks_are_computed_and_held_once(
    fake: ModuleType, prefix_caching: bool, run_ahead: int
) -> None:
    samples = _samples(fake, n=4)
    run = _run(fake, samples, prefix_caching=prefix_caching, run_ahead=run_ahead)
    assert _opened(run) == [[0], [28, 28, 28]]
    stats = run.coordinator.stats
    # 7 together, and 3 more for the 37 tokens of each, or the first has ended before the others need their last.
    assert stats.peak_used_blocks == 7 + 3 * (4 if run_ahead else 3)
    assert stats.num_token_steps == 30 + 3 * 2 + 4 * 7
    assert stats.num_cached_prompt_tokens == 3 * 28
    outputs = [request.output_token_ids for request in samples.requests]
    assert len(set(map(tuple, outputs))) == 4
    for request, output in zip(samples.requests, outputs, strict=True):
        alone = fake.make_request("a", 30, n=4, max_tokens=8).sample(request.sample_index)
        lone = fake.Run(fake.make_limits())
        lone.add(alone)
        lone.to_the_end()
        assert alone.output_token_ids == output


def test_the_first_sample_is_the_answer_without_n(fake: ModuleType) -> None:
    samples, one = _samples(fake, n=3), _samples(fake, n=1)
    _run(fake, samples)
    _run(fake, one)
    assert samples.requests[0].output_token_ids == one.requests[0].output_token_ids
    assert {request.seed for request in samples.requests} == {one.requests[0].seed}
    assert [request.sample_index for request in samples.requests] == [0, 1, 2]


@pytest.mark.parametrize(
    ("prefix_caching", "opened"), [(False, [[0, 0, 0], [28, 28]]), (True, [[0], [28] * 4])]
)
def test_without_prefix_caching_only_one_prompts_samples_share(
    fake: ModuleType, prefix_caching: bool, opened: list[list[int]]
) -> None:
    """Two rows with n = 2 and a third with n = 1 have the same prompt."""
    prompt = fake.make_tokens("same", 30)
    groups = [
        Samples(fake.make_request(name, 30, prompt, n=n, max_tokens=6))
        for name, n in (("a", 2), ("b", 2), ("c", 1))
    ]
    run = _run(fake, *groups, prefix_caching=prefix_caching, max_num_batched_tokens=200)
    assert _opened(run) == opened


@BOTH
def test_a_prompt_in_chunks_is_read_once(fake: ModuleType, prefix_caching: bool) -> None:
    samples = _samples(fake, n=3, num_prompt=40)
    run = _run(fake, samples, prefix_caching=prefix_caching, max_num_batched_tokens=9)
    assert run.coordinator.stats.num_token_steps == 40 + 2 * 4 + 3 * 7  # its last block by each
    assert run.coordinator.stats.num_cached_prompt_tokens == 2 * 36


@BOTH
def test_more_samples_than_slots(fake: ModuleType, prefix_caching: bool) -> None:
    samples = _samples(fake, n=7)
    run = _run(fake, samples, prefix_caching=prefix_caching, max_num_seqs=2)
    assert [found for plan in _opened(run) for found in plan] == [0] + [28] * 6


@BOTH
def test_no_cache_at_all(fake: ModuleType, prefix_caching: bool) -> None:
    _run(fake, _samples(fake, n=3), cache_enabled=False, prefix_caching=prefix_caching)


@BOTH
@pytest.mark.parametrize("run_ahead", [0, 2])
def test_a_preempted_sample_finds_the_prompt_again(
    fake: ModuleType, prefix_caching: bool, run_ahead: int
) -> None:
    """3 blocks of prompt together and 8 more for each at the end: 11 + 8 are more than there are."""
    samples = _samples(fake, n=2, num_prompt=14, max_tokens=30)
    limits = {"prefix_caching": prefix_caching, "run_ahead": run_ahead, "num_blocks": 16}
    run = _run(fake, samples, **limits)
    assert [request.num_preemptions for request in samples.requests] == [0, 1]
    [again] = _opened(run)[2]
    assert again >= 12


@BOTH
def test_one_that_fails_says_so_and_the_others_go_on(fake: ModuleType, prefix_caching: bool) -> None:
    samples = _samples(fake, n=3)
    assert samples.error is None
    second = samples.requests[1]
    whole, _ = fake.expected(second, (), 200)
    begin = second.prompt_token_ids + whole[:3]
    run = fake.Run(fake.make_limits(prefix_caching=prefix_caching))
    run.shards.without_token = lambda tokens, seed: tokens == begin
    run.add(*samples.requests)
    run.to_the_end()
    run.assert_as_expected(samples.requests[0], samples.requests[2])
    assert (second.finish_reason, second.output_token_ids) == ("error", whole[:3])
    assert samples.error == f"1 of 3 samples failed, the first at index 1: {second.error}"


def test_samples_are_told_from_each_other_and_from_any_id(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits())
    samples, other = _samples(fake, n=2), fake.make_request("a#1", 5, max_tokens=4)
    run.add(*samples.requests, other)
    run.step()
    assert run.coordinator.abort("a", 1) is samples.requests[1]
    assert run.coordinator.abort("a", 1) is None
    run.to_the_end()
    run.assert_as_expected(samples.requests[0], other)
    assert samples.requests[1].finish_reason == "abort"
    assert [samples.end_one() for _ in range(2)] == [False, True]

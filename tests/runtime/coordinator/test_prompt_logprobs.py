"""Every prompt token's log probability comes once: through chunks, preemptions, cached prefixes and failures."""

from types import ModuleType

import numpy as np
import pytest

from kvshard.runtime.coordinator.samples import Samples


@pytest.mark.parametrize("cache_enabled", [True, False])
@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_chunks_that_end_anywhere(fake: ModuleType, run_ahead: int, cache_enabled: bool) -> None:
    limits = fake.make_limits(max_num_batched_tokens=8, run_ahead=run_ahead, cache_enabled=cache_enabled)
    run = fake.Run(limits)
    rows = [fake.make_request(f"r{n}", n, prompt_logprobs=n % 3, max_tokens=3) for n in (1, 2, 7, 20, 33)]
    run.add(*rows, fake.make_request("plain", 9))
    run.to_the_end()
    run.assert_as_expected(*run.finished)
    assert all(len(row.prompt_logprobs) > 2 for row in rows[3:])


def test_a_row_preempted_during_its_prompt_is_told_each_token_once(fake: ModuleType) -> None:
    """The first row takes the last blocks while the second one's long prompt is on its way."""
    limits = fake.make_limits(num_blocks=10, max_model_len=36, max_num_batched_tokens=3)
    run = fake.Run(limits)
    run.add(fake.make_request("first", 4, max_tokens=25))
    run.add(fake.make_request("second", 24, max_tokens=4, prompt_logprobs=1))
    seen = set()
    for _ in range(60):
        run.step()
        [row] = [row for row in run.coordinator._requests.values() if row.request_id == "second"] or [None]
        if row is not None:
            seen.add((row.num_preemptions, row.num_targets))
    run.to_the_end()
    assert max(seen)[0] > 0
    assert any(0 < num_targets < 23 for num_preemptions, num_targets in seen if num_preemptions)
    run.assert_as_expected(*run.finished)


def test_cached_prefixes_are_left_alone_and_left_behind(fake: ModuleType) -> None:
    prefix = fake.make_tokens("text", 20)
    run = fake.Run(fake.make_limits())
    rows = [
        fake.make_request(name, 30, prefix, prompt_logprobs=prompt_logprobs, max_tokens=2)
        for name, prompt_logprobs in (("a", None), ("b", 0), ("c", None))
    ]
    for row in rows:
        run.add(row)
        run.to_the_end()
    run.assert_as_expected(*rows)
    stats = run.coordinator.stats
    assert (stats.num_cached_prompt_tokens, stats.num_looked_up_prompt_tokens) == (20, 60)
    assert stats.num_token_steps == 30 + 30 + 10 + 3  # and the first token of each answer


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_the_first_of_several_samples_is_told_and_the_others_share_its_prompt(
    fake: ModuleType, prefix_caching: bool
) -> None:
    run = fake.Run(fake.make_limits(prefix_caching=prefix_caching, windows=(None, 6)))
    samples = Samples(fake.make_request("a", 22, n=3, prompt_logprobs=0, max_tokens=3)).requests
    run.add(*samples)
    run.to_the_end()
    run.assert_as_expected(*samples)
    assert [bool(sample.prompt_logprobs) for sample in samples] == [True, False, False]
    assert run.coordinator.stats.num_cached_prompt_tokens >= 2 * 20


def test_a_later_pass_begins_behind_what_was_told(fake: ModuleType) -> None:
    row = fake.make_request("a", 10, prompt_logprobs=0)
    assert row.num_skippable == 0
    row.num_targets = 5
    assert row.num_skippable == 5
    row.num_targets = 9
    row.output_token_ids = [1, 2]
    assert row.num_skippable == 11


@pytest.mark.parametrize("length", [3, 9, 20])
def test_a_prompt_whose_logits_are_not_finite_fails_its_row_alone(fake: ModuleType, length: int) -> None:
    run = fake.Run(fake.make_limits(max_num_batched_tokens=8))
    rows = [fake.make_request(name, 20, prompt_logprobs=0, max_tokens=5) for name in "ab"]
    run.shards.without_token = lambda num_tokens, seed: seed == rows[0].seed and num_tokens == length
    run.add(*rows)
    run.to_the_end()
    assert rows[0].finish_reason == "error"
    assert "not finite" in rows[0].error
    assert rows[0].output_token_ids == []
    run.assert_as_expected(rows[1])


def test_plans_without_prompt_logprobs_carry_none(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits())
    run.add(fake.make_request("a", 30, logprobs=3))
    run.to_the_end()
    assert all(plan.targets is None for plan in run.shards.plans)


def test_a_plan_names_the_token_before_each_target(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits(max_num_batched_tokens=10, run_ahead=0))
    first, second = fake.make_request("a", 6, prompt_logprobs=2), fake.make_request("b", 9, prompt_logprobs=5)
    run.add(first, second)
    run.step()
    run.step()
    targets = [plan.targets for plan in run.shards.plans]
    assert [part.places.tolist() for part in targets] == [[0, 1, 2, 3, 4, 6, 7, 8, 9], [1, 2, 3, 4]]
    assert targets[0].token_ids.tolist() == first.prompt_token_ids[1:] + second.prompt_token_ids[1:5]
    assert targets[1].token_ids.tolist() == second.prompt_token_ids[5:]
    assert [part.num_top for part in targets] == [5, 5]
    assert all(part.places.dtype == part.token_ids.dtype == np.int32 for part in targets)


def test_a_block_copied_from_another_sample_ends_where_tokens_are_to_be_told(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits(block_size=4))
    first, second = Samples(fake.make_request("a", 10, n=2, prompt_logprobs=0, max_tokens=9)).requests
    run.add(second)
    run.step()
    scheduler = run.coordinator._scheduler
    copies = []
    for num_targets in (8, 9):  # as after a preemption
        first.num_targets = num_targets
        copies.append(scheduler._prefixes.sample_to_copy(first, 2, scheduler.slots))
    assert copies == [None, (second, 9)]

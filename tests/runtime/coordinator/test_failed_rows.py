"""A row whose logits are not finite fails alone."""

from types import ModuleType

import pytest


def _broken_from(run: object, seed: int, length: int) -> None:
    """No token for sequences of `seed` from `length` on."""
    run.shards.without_token = lambda num_tokens, row_seed: row_seed == seed and num_tokens >= length


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
@pytest.mark.parametrize("num_good", [0, 5])
@pytest.mark.parametrize("cache_enabled", [True, False])
def test_others_go_on(fake: ModuleType, run_ahead: int, num_good: int, cache_enabled: bool) -> None:
    run = fake.Run(fake.make_limits(run_ahead=run_ahead, cache_enabled=cache_enabled))
    rows = [fake.make_request(name, 6, max_tokens=20, logprobs=0) for name in "abc"]
    _broken_from(run, rows[1].seed, 6 + num_good)
    run.add(*rows)
    run.to_the_end()
    assert (rows[1].status, rows[1].finish_reason) == ("finished", "error")
    assert "logits are not finite" in rows[1].error
    assert rows[1].output_token_ids == fake.expected(rows[1], (), 200)[0][:num_good]
    assert len(rows[1].output_logprobs) == num_good
    run.assert_as_expected(rows[0], rows[2])
    assert rows[0].error is None
    assert sorted(row.request_id for row in run.finished) == ["a", "b", "c"]


def test_a_row_with_masks_may_have_left_itself_nothing(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits())
    request = fake.make_request("a", 6, max_tokens=20, allowed_token_ids=[5])
    _broken_from(run, request.seed, 6)
    run.add(request)
    run.to_the_end()
    assert request.finish_reason == "error"
    assert request.error.startswith("allowed_token_ids, bad_words and min_tokens may leave no token")


def test_a_row_that_has_ended_cannot_fail_afterwards(fake: ModuleType) -> None:
    """Plans in flight go on past its EOS; what they compute is nobody's business."""
    request = fake.make_request("a", 6, max_tokens=20)
    full, _ = fake.expected(request, (), 200)
    run = fake.Run(fake.make_limits(run_ahead=3), eos=(full[3],))
    _broken_from(run, request.seed, 6 + 4)
    run.add(request)
    run.to_the_end()
    assert (request.finish_reason, request.error) == ("stop", None)


def test_a_preempted_row_may_fail_by_a_result_in_flight(fake: ModuleType) -> None:
    def run_until_preempted() -> tuple[object, list]:
        run = fake.Run(fake.make_limits(run_ahead=1, num_blocks=12))
        rows = [fake.make_request(name, 12, max_tokens=25) for name in "ab"]
        run.add(*rows)
        return run, rows

    probe, rows = run_until_preempted()
    while not rows[1].num_preemptions:
        probe.step()
    num_known = rows[1].num_tokens
    run, rows = run_until_preempted()
    _broken_from(run, rows[1].seed, num_known - 1)
    run.to_the_end()
    assert (rows[1].finish_reason, rows[1].num_preemptions) == ("error", 1)
    assert rows[1].num_tokens == num_known - 1
    run.assert_as_expected(rows[0])

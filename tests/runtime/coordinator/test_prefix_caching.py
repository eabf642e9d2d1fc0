"""What rows share is computed once, found later, and never wrong."""

from types import ModuleType
from typing import Any

import pytest

from kvshard.runtime.coordinator.prefixes import extend_hashes


def _opened(run: Any) -> list[list[int]]:
    """For each plan sent: the tokens that each row it opens found in the cache."""
    return [[opened.context_len for opened in plan.opened] for plan in run.shards.plans]


def _found(run: Any, row: Any) -> int:
    """Run `row` by itself: the tokens it found in the cache."""
    num_before = len(run.shards.plans)
    run.add(row)
    run.to_the_end()
    [found] = [context for plan in _opened(run)[num_before:] for context in plan]
    return found


def test_hashes_are_of_the_whole_sequence(fake: ModuleType) -> None:
    tokens = fake.make_tokens("a", 23)
    whole = fake.make_request("whole", 23, prefix=tokens)
    extend_hashes(whole, 4)
    assert len(set(whole.block_hashes)) == 5

    grown = fake.make_request("grown", 6, prefix=tokens[:6])
    for token in tokens[6:]:
        extend_hashes(grown, 4)
        assert grown.block_hashes == whole.block_hashes[: grown.num_tokens // 4]
        grown.output_token_ids.append(token)
    extend_hashes(grown, 4)
    assert grown.block_hashes == whole.block_hashes

    other = fake.make_request("other", 23, prefix=[*tokens[:5], tokens[5] + 1, *tokens[6:]])
    extend_hashes(other, 4)
    assert other.block_hashes[0] == whole.block_hashes[0]
    assert not set(other.block_hashes[1:]) & set(whole.block_hashes)


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_a_shared_prefix_is_computed_once(fake: ModuleType, run_ahead: int) -> None:
    """The second row starts one plan later, while the plan that computes the prefix may still be in flight."""
    run = fake.Run(fake.make_limits(run_ahead=run_ahead))
    prefix = fake.make_tokens("prefix", 26)
    rows = [
        fake.make_request("a", 30, prefix, max_tokens=8),
        fake.make_request("b", 29, prefix, max_tokens=8),
    ]
    run.add(*rows)
    run.to_the_end()
    run.assert_as_expected(*rows)
    assert _opened(run)[:2] == [[0], [24]]
    assert run.shards.plans[1].row_num_new_tokens.tolist() == [1, 5]
    stats = run.coordinator.stats
    assert (stats.num_cached_prompt_tokens, stats.num_looked_up_prompt_tokens) == (24, 59)
    assert stats.num_token_steps == 30 + 5 + 2 * 7
    assert stats.peak_used_layer_blocks == 6 + 4 + 3  # shared, and of 37 and 36 tokens


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
@pytest.mark.parametrize("ends_early", [True, False])
def test_a_later_row_finds_prompt_and_answer(fake: ModuleType, run_ahead: int, ends_early: bool) -> None:
    """As the next turn of a chat does, however far plans ran on past the answer's end."""
    first = fake.make_request("a", 11, max_tokens=9)
    answer, _ = fake.expected(first, (), 200)
    assert answer[8] not in answer[:8]
    if ends_early:
        first = fake.make_request("a", 11, max_tokens=30, stop_token_ids=[answer[8]])
    run = fake.Run(fake.make_limits(run_ahead=run_ahead))
    assert _found(run, first) == 0
    second = fake.make_request("b", 26, first.prompt_token_ids + answer, max_tokens=5)
    assert _found(run, second) == 16  # of 19 tokens whose successors are known
    third = fake.make_request("c", 26, second.prompt_token_ids, max_tokens=5)
    assert _found(run, third) == 24
    run.assert_as_expected(first, second, third)


def test_the_last_prompt_token_is_always_computed(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits())
    rows = [fake.make_request(name, 8, fake.make_tokens("both", 8), max_tokens=3) for name in "ab"]
    assert [_found(run, row) for row in rows] == [0, 4]
    assert run.shards.plans[-3].row_num_new_tokens.tolist() == [4]
    run.assert_as_expected(*rows)


def test_the_longest_unused_is_evicted_from_its_end(fake: ModuleType) -> None:
    """8 blocks: a and b leave 3 each, c takes 3, of which one is the end of a."""
    run = fake.Run(fake.make_limits(num_blocks=9, max_model_len=30))
    names = "abc"
    rows = [fake.make_request(name, 12 - (name == "c"), max_tokens=1) for name in names]
    assert [_found(run, row) for row in rows] == [0, 0, 0]
    again = fake.make_request("a again", 16, rows[0].prompt_token_ids, max_tokens=1)
    assert _found(run, again) == 8  # it takes the end of b, not its own beginning
    other = fake.make_request("b again", 16, rows[1].prompt_token_ids, max_tokens=1)
    assert _found(run, other) == 8
    run.assert_as_expected(*rows, again, other)


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_a_preempted_row_takes_what_is_left_of_its_own(fake: ModuleType, run_ahead: int) -> None:
    """11 blocks: the first row comes to need 9 of them, and the other's first 2 stay."""
    num_token_steps = {}
    for prefix_caching in (True, False):
        run = fake.Run(fake.make_limits(run_ahead=run_ahead, num_blocks=12, prefix_caching=prefix_caching))
        rows = [fake.make_request(name, 12, max_tokens=25) for name in "ab"]
        run.add(*rows)
        run.to_the_end()
        run.assert_as_expected(*rows)
        assert [row.num_preemptions for row in rows] == [0, 1]
        found = [context for plan in _opened(run) for context in plan]
        assert found == [0, 0, 8 if prefix_caching else 0]
        # A prompt's second admission is no hit.
        assert run.coordinator.stats.num_cached_prompt_tokens == 0
        num_token_steps[prefix_caching] = run.coordinator.stats.num_token_steps
    assert num_token_steps[True] == num_token_steps[False] - 8


def test_rows_wait_for_what_they_share_and_others_pass(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits(run_ahead=1))
    rows = [
        fake.make_request(name, 14, fake.make_tokens(name[0], 9), max_tokens=4)
        for name in ("a1", "a2", "b1", "b2", "c1")
    ]
    run.add(*rows)
    run.to_the_end()
    run.assert_as_expected(*rows)
    assert _opened(run)[:2] == [[0, 0, 0], [8, 8]]
    assert [row.admitted_s == rows[0].admitted_s for row in rows] == [True, False, True, False, True]


def test_a_slot_is_left_for_a_row_that_waits(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits(max_num_seqs=2))
    rows = [
        fake.make_request(name, 14, fake.make_tokens(name[0], 9), max_tokens=9) for name in ("a1", "a2", "b")
    ]
    run.add(*rows)
    run.to_the_end()
    assert _opened(run)[:2] == [[0], [8]]
    run.assert_as_expected(*rows)


def test_a_row_waits_once_for_each_row_ahead(fake: ModuleType) -> None:
    """Row i shares i blocks with the last one, which so waits for each of them; others come all the time."""
    run = fake.Run(fake.make_limits(run_ahead=0, max_num_seqs=6))
    prefix = fake.make_tokens("prefix", 16)
    rows = [fake.make_request(f"{i}", 18, prefix[: 4 * i], max_tokens=2) for i in range(1, 5)]
    last = fake.make_request("last", 18, prefix, max_tokens=2)
    run.add(*rows, last)
    num_others = 0
    while last.admitted_s is None:
        run.add(*(fake.make_request(f"other {num_others + i}", 5, max_tokens=20) for i in range(3)))
        num_others += 3
        run.step()
        assert len(run.shards.plans) <= 5
    assert _opened(run)[-1][0] == 16
    run.to_the_end()
    run.assert_as_expected(*run.finished)


def test_what_an_aborted_row_computed_is_found(fake: ModuleType) -> None:
    """Its prompt was half read when it ended, with plans in flight."""
    run = fake.Run(fake.make_limits(run_ahead=1, max_num_batched_tokens=9))
    rows = [fake.make_request(name, 40, fake.make_tokens("both", 39), max_tokens=4) for name in "ab"]
    run.add(*rows)
    run.step()
    assert run.coordinator.num_waiting == 1
    run.coordinator.abort("a")
    run.coordinator.check_integrity()
    run.to_the_end()
    assert _opened(run)[2] == [16]  # two plans of 9 tokens were sent
    run.assert_as_expected(rows[1])


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
@pytest.mark.parametrize("num_good", [0, 7])
def test_a_row_that_fails_leaves_nothing(fake: ModuleType, run_ahead: int, num_good: int) -> None:
    run = fake.Run(fake.make_limits(run_ahead=run_ahead))
    prompt = fake.make_tokens("prompt", 14)
    bad = fake.make_request("bad", 14, prompt, max_tokens=20)
    run.shards.without_token = lambda num_tokens, seed: seed == bad.seed and num_tokens >= 14 + num_good
    first = fake.make_request("first", 9, prompt[:8], max_tokens=2)
    assert _found(run, first) == 0
    assert _found(run, bad) == 8
    assert (bad.finish_reason, len(bad.output_token_ids)) == ("error", num_good)
    # Not even what it shared with the first.
    assert not any(map(run.blocks[0].is_published, range(run.limits.num_blocks)))
    again = fake.make_request("again", 30, prompt + bad.output_token_ids, max_tokens=4)
    assert _found(run, again) == 0
    once_more = fake.make_request("once more", 30, again.prompt_token_ids, max_tokens=4)
    assert _found(run, once_more) == 28
    run.assert_as_expected(first, again, once_more)


def test_a_row_that_fails_once_preempted_leaves_nothing(fake: ModuleType) -> None:
    """Its blocks are in the cache already when the result without a token comes back."""

    def start() -> tuple[Any, list[Any]]:
        run = fake.Run(fake.make_limits(run_ahead=1, num_blocks=12))
        rows = [fake.make_request(name, 12, max_tokens=25) for name in "ab"]
        run.add(*rows)
        return run, rows

    run, rows = start()
    while not rows[1].num_preemptions:
        run.step()
    num_known = rows[1].num_tokens
    run, rows = start()
    run.shards.without_token = lambda num_tokens, seed: seed == rows[1].seed and num_tokens >= num_known - 1
    while not rows[1].num_preemptions:
        run.step()
    hashes = list(rows[1].block_hashes)
    while rows[1].status != "finished":
        assert any(map(run.blocks[0].find, hashes))
        run.step()
    assert rows[1].finish_reason == "error"
    assert not any(map(run.blocks[0].find, hashes))
    run.to_the_end()
    run.assert_as_expected(rows[0])


@pytest.mark.parametrize("changes", [{"prefix_caching": False}, {"cache_enabled": False}], ids=str)
def test_off(fake: ModuleType, changes: dict[str, bool]) -> None:
    run = fake.Run(fake.make_limits(**changes))
    rows = [fake.make_request(name, 30, fake.make_tokens("both", 24), max_tokens=3) for name in "ab"]
    run.add(*rows)
    run.to_the_end()
    again = fake.make_request("again", 30, rows[0].prompt_token_ids, max_tokens=3)
    run.add(again)
    run.to_the_end()
    run.assert_as_expected(*rows, again)
    assert {context for plan in _opened(run) for context in plan} == {0}
    assert len(run.shards.plans[0].opened) == 2  # nobody waits
    stats = run.coordinator.stats
    assert (stats.num_cached_prompt_tokens, stats.num_looked_up_prompt_tokens) == (0, 0)

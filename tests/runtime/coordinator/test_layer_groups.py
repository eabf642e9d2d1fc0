"""Layers with a window: what rows hold, what they give up and when, what prefixes need, and the sizes that follow."""

from types import ModuleType
from typing import Any

import pytest

from kvshard.runtime.errors import RequestError

WINDOWS = [(None, 6), (None, 17, 4), (5,), (4, 1)]


def _held(run: Any, row: Any) -> list[int]:
    """Blocks of each layer group that a row holds."""
    return [sum(block != 0 for block in table) for table in row.block_tables]


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_row_holds_what_its_next_query_sees(
    fake: ModuleType, windows: tuple[int | None, ...], chunk: int
) -> None:
    """While its prompt is read in chunks and as it grows: at most ceil(window / block_size) + 1 blocks and a chunk's."""
    run = fake.Run(fake.make_limits(windows=windows, max_num_seqs=1, max_num_batched_tokens=chunk))
    row = fake.make_request("a", 58, max_tokens=82)  # not a full block: the next token gives up nothing
    run.add(row)
    most = [0] * len(windows)
    while run.coordinator.has_work:
        run.step()
        if row.block_tables:
            most = [max(pair) for pair in zip(most, _held(run, row), strict=True)]
        if row.output_token_ids and row.block_tables:  # nothing of the last chunk that the window has passed
            for window, held in zip(windows, _held(run, row), strict=True):
                assert window is None or held <= -(-window // 4) + 1
    run.assert_as_expected(row)
    for window, held in zip(windows, most, strict=True):
        if window is None:
            assert held == 35  # 139 tokens
        else:
            assert held <= -(-window // 4) + 1 + -(-(chunk - 1) // 4)
            assert held >= -(-window // 4)


def test_a_prompt_that_is_read_makes_room_for_the_next(fake: ModuleType) -> None:
    """A chunk is many times the window: 8 rows of 250 tokens take a step each, then 8 for their answers."""
    sizes = {"max_model_len": 300, "num_blocks": 2000, "max_num_batched_tokens": 256}
    run = fake.Run(fake.make_limits(windows=(None, 16), prefix_caching=False, **sizes))
    rows = [fake.make_request(f"{i}", 250, max_tokens=9) for i in range(8)]
    run.add(*rows)
    run.to_the_end()
    run.assert_as_expected(*rows)
    assert run.coordinator.stats.num_steps <= 8 + 8 + 2
    assert run.coordinator.stats.num_preemptions == 0


def test_blocks_outside_a_window_serve_other_rows(fake: ModuleType) -> None:
    """Rows of 140 tokens, in a window group with far fewer blocks than any of them has."""
    limits = fake.make_limits(windows=(5,), num_blocks=12, max_num_batched_tokens=8, prefix_caching=False)
    assert limits.longest_request == 200
    run = fake.Run(limits)
    rows = [fake.make_request(name, 100, max_tokens=40) for name in "abc"]
    run.add(*rows)
    run.to_the_end()
    run.assert_as_expected(*rows)
    assert run.coordinator.stats.peak_used_layer_blocks <= 11


def test_a_prefix_needs_only_its_end_in_a_window_group(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits(windows=(None, 6)))
    prefix = fake.make_tokens("prefix", 24)
    rows = [fake.make_request(name, 30, prefix, max_tokens=3) for name in "ab"]
    run.add(rows[0])
    run.to_the_end()
    run.add(rows[1])
    run.to_the_end()
    run.assert_as_expected(*rows)
    opened = run.shards.plans[-3].opened[0]
    assert opened.context_len == 24
    full, window = opened.block_ids
    assert len(full) == 8
    assert 0 not in full
    assert window[:4] == (0,) * 4  # position 24 sees 19 to 24
    assert len(window) == 6
    assert 0 not in window[4:]


@pytest.mark.parametrize(("lost", "found"), [(0, 24), (3, 24), (4, 16), (5, 20)])
def test_a_prefix_whose_end_is_gone_from_the_window_is_cut(fake: ModuleType, lost: int, found: int) -> None:
    """A prefix of n blocks needs blocks n - 2 and n - 1 in a window of 6, and all of them with full attention."""
    run = fake.Run(fake.make_limits(windows=(None, 6)))
    prefix = fake.make_tokens("prefix", 24)
    first = fake.make_request("first", 30, prefix, max_tokens=3)
    run.add(first)
    run.step()
    hashes = list(first.block_hashes)
    run.to_the_end()
    run.blocks[1].withdraw([hashes[lost]])
    again = fake.make_request("again", 30, prefix, max_tokens=3)
    run.add(again)
    run.to_the_end()
    run.assert_as_expected(again)
    assert run.shards.plans[-3].opened[0].context_len == found


def test_what_full_attention_has_lost_no_window_makes_up_for(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits(windows=(None, 6)))
    prefix = fake.make_tokens("prefix", 24)
    first = fake.make_request("first", 30, prefix, max_tokens=3)
    run.add(first)
    run.step()
    hashes = list(first.block_hashes)
    run.to_the_end()
    run.blocks[0].withdraw(hashes[1:2])
    run.add(fake.make_request("again", 30, prefix, max_tokens=3))
    run.to_the_end()
    assert run.shards.plans[-3].opened[0].context_len == 4


def test_a_full_cache_preempts_in_every_group(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits(windows=(None, 6), num_blocks=20))
    rows = [fake.make_request(name, 20, max_tokens=30) for name in "abc"]
    run.add(*rows)
    run.to_the_end()
    run.assert_as_expected(*rows)
    assert run.coordinator.stats.num_preemptions > 0


def test_a_prompt_waits_where_a_window_group_is_full(fake: ModuleType) -> None:
    """Its first chunk fitted; then rows that decode took the blocks. It goes on when one of them has ended."""
    run = fake.Run(fake.make_limits(windows=(17,), num_blocks=9, max_num_batched_tokens=9, run_ahead=0))
    rows = [fake.make_request(name, 12, max_tokens=15) for name in "ab"]
    late = fake.make_request("late", 60, max_tokens=2)
    run.add(*rows, late)
    num_waits = 0
    while run.coordinator.has_work:
        is_half_read = late.slot >= 0 and late.slot in run.coordinator._scheduler._prefills
        run.step()
        num_waits += is_half_read and late.slot not in run.shards.plans[-1].row_slots
    assert num_waits > 0
    run.assert_as_expected(*rows, late)


def test_sizes_of_the_groups(fake: ModuleType) -> None:
    """400 blocks of 4 tokens; 8 rows of at most 50 blocks; 64 tokens a step; an eighth of 8 rows for prefixes."""
    limits = fake.make_limits(windows=(None, 17, 6))
    assert limits.group_blocks == (400, 9 * 6 + 16 + 1, 9 * 3 + 16 + 1)
    assert limits.num_layer_blocks == 400 + 71 + 44
    assert fake.make_limits(windows=(None, 6), prefix_caching=False).group_blocks == (400, 8 * 3 + 16 + 1)
    assert fake.make_limits(windows=(None, 6), num_blocks=30).group_blocks == (30, 30)
    assert fake.make_limits(windows=(None, 10**6), num_blocks=900).group_blocks == (900, 8 * 50 + 1)


@pytest.mark.parametrize("budget", [8, 64])
@pytest.mark.parametrize(
    ("windows", "num_blocks", "longest"),
    [((None, 6), 21, 80), ((6,), 4, 200), ((6,), 3, 8), ((9, 6), 5, 200), ((9, 6), 4, 12), ((500,), 21, 80)],
)
def test_the_longest_request_runs_and_a_longer_one_is_refused(
    fake: ModuleType, windows: tuple[int | None, ...], num_blocks: int, longest: int, budget: int
) -> None:
    run = fake.Run(fake.make_limits(windows=windows, num_blocks=num_blocks, max_num_batched_tokens=budget))
    assert run.limits.longest_request == longest
    row = fake.make_request("fits", longest - 6, max_tokens=6 if longest == 200 else 7)
    run.add(row)
    run.to_the_end()
    run.assert_as_expected(row)
    if longest < 200:
        with pytest.raises(RequestError, match=f"the cache has {num_blocks - 1}"):
            run.add(fake.make_request("does not", longest - 6, max_tokens=8))

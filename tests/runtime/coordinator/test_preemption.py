"""Who gives way when blocks run out, and that everyone comes to an end."""

from types import ModuleType
from typing import Any

import pytest


def _until_preempted(run: Any, rows: list[Any]) -> list[int]:
    """Which of `rows` gave way first."""
    run.add(*rows)
    while not any(row.num_preemptions for row in rows):
        run.step()
    return [index for index, row in enumerate(rows) if row.num_preemptions]


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
@pytest.mark.parametrize(
    ("sizes", "victim"),
    [
        ((20, 9, 30), 1),  # the fewest tokens
        ((5, 30, 21), 2),  # never the first, though it has fewer
        ((20, 17, 17), 2),  # of two alike, the last to arrive
    ],
)
def test_the_cheapest_row_gives_way(
    fake: ModuleType, sizes: tuple[int, ...], victim: int, run_ahead: int
) -> None:
    num_blocks = 1 + sum(-(-size // 4) for size in sizes) + 3
    run = fake.Run(fake.make_limits(num_blocks=num_blocks, max_num_batched_tokens=100, run_ahead=run_ahead))
    rows = [fake.make_request(f"{i}", size, max_tokens=20) for i, size in enumerate(sizes)]
    assert _until_preempted(run, rows) == [victim]
    run.to_the_end()
    run.assert_as_expected(*rows)


def test_what_others_hold_too_is_not_lost(fake: ModuleType) -> None:
    """The longest row shares all but its end, so it has the least to compute again."""
    shared = fake.make_tokens("shared", 40)
    run = fake.Run(fake.make_limits(num_blocks=1 + 10 + 2 + 1 + 5 + 2))
    rows = [
        fake.make_request("0", 47, shared, max_tokens=20),
        fake.make_request("1", 17, max_tokens=20),
        fake.make_request("2", 42, shared, max_tokens=20),
    ]
    assert _until_preempted(run, rows) == [2]
    run.to_the_end()
    run.assert_as_expected(*rows)


def test_the_cheapest_row_is_not_starved(fake: ModuleType) -> None:
    """A row that is always the cheapest to preempt, among a stream of dearer ones that come after it."""
    run = fake.Run(fake.make_limits(num_blocks=24, max_num_seqs=6))
    cheap = fake.make_request("cheap", 3, max_tokens=50)
    run.add(fake.make_request("first", 24, max_tokens=10), cheap)
    num_added = 0
    while cheap.status != "finished":
        while run.coordinator.num_waiting < 3:
            run.add(fake.make_request(f"dear {num_added}", 24, max_tokens=12))
            num_added += 1
        run.step()
        assert len(run.shards.plans) < 150
    assert cheap.num_preemptions > 0
    run.to_the_end()
    run.assert_as_expected(*run.finished)

"""Who gives way when blocks run out, and that everyone comes to an end."""

import random
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
    """The longest row shares all but its end, so it has the least to compute again when the second needs a block."""
    shared = fake.make_tokens("shared", 40)
    run = fake.Run(fake.make_limits(num_blocks=1 + 12 + 5 + 1 + 1))
    rows = [
        fake.make_request("0", 47, shared, max_tokens=20),
        fake.make_request("1", 17, max_tokens=20),
        fake.make_request("2", 41, shared, max_tokens=20),
    ]
    assert _until_preempted(run, rows) == [2]
    run.to_the_end()
    run.assert_as_expected(*rows)


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_the_first_to_have_arrived_always_goes_on(fake: ModuleType, run_ahead: int) -> None:
    """Rows of all sizes in a cache for two or three: the first of the unfinished is preempted no more, so all end."""
    num_preemptions = num_admitted_late = 0
    for seed in range(30):
        chance = random.Random(seed)
        limits = fake.make_limits(
            num_blocks=16, max_model_len=60, max_num_seqs=chance.choice([3, 6]), run_ahead=run_ahead
        )
        run = fake.Run(limits)
        rows = [
            fake.make_request(f"{seed} {i}", chance.randrange(1, 30), max_tokens=chance.randrange(5, 31))
            for i in range(14)
        ]
        run.add(*rows)
        for first in rows:
            while first.status == "waiting":
                run.step()
            running = run.coordinator._scheduler.slots.owners.values()
            num_admitted_late += first in running and first is not next(iter(running))
            num_before = first.num_preemptions
            while first.status != "finished":
                run.step()
            assert first.num_preemptions == num_before
        run.to_the_end()
        run.assert_as_expected(*rows)
        num_preemptions += run.coordinator.stats.num_preemptions
    assert num_preemptions > 0
    assert num_admitted_late > 0  # after rows that arrived later, as it was preempted for one before it

"""Random requests, limits, aborts and pauses: no rule is broken and every token is right."""

import random
from types import ModuleType

import pytest

NUM_WALKS = 240


def _limits(fake: ModuleType, chance: random.Random) -> object:
    max_num_seqs = chance.choice([1, 2, 5, 8])
    max_model_len = chance.choice([30, 48])
    block_size = chance.choice([1, 3, 4, 16])
    num_longest = -(-max_model_len // block_size)
    return fake.make_limits(
        block_size=block_size,
        num_blocks=1 + num_longest + chance.choice([0, 2, num_longest]),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_seqs, chance.choice([1, 5, 16, 64])),
        run_ahead=chance.choice([0, 1, 2, 3]),
        cache_enabled=chance.random() < 0.8,
    )


def _request(fake: ModuleType, chance: random.Random, name: str) -> object:
    max_tokens = chance.choice([1, 2, 7, 20, None])
    return fake.make_request(
        name,
        chance.randrange(1, 28),
        max_tokens=max_tokens,
        min_tokens=0 if max_tokens is None else chance.randrange(0, max_tokens + 1),
        stop_token_ids=chance.sample(range(97), chance.choice([0, 0, 4])),
        ignore_eos=chance.random() < 0.3,
        seed=chance.choice([None, 3]),
    )


@pytest.mark.parametrize("first_seed", range(0, NUM_WALKS, 40))
def test_walk(fake: ModuleType, first_seed: int) -> None:
    num_preemptions = num_dropped = num_aborted = 0
    for seed in range(first_seed, first_seed + 40):
        chance = random.Random(seed)
        run = fake.Run(_limits(fake, chance), eos=tuple(chance.sample(range(97), 3)))
        rows = []
        for _ in range(chance.randrange(10, 60)):
            action = chance.random()
            if action < 0.3 and len(rows) < 14:
                rows.append(_request(fake, chance, f"{seed} {len(rows)}"))
                run.add(rows[-1])
            elif action < 0.36 and rows:
                run.coordinator.abort(chance.choice(rows).request_id)
                run.coordinator.check_integrity()
            else:
                run.step()
        run.to_the_end()
        aborted = [row for row in rows if row.finish_reason == "abort"]
        assert sorted(row.arrival for row in rows) == sorted(row.arrival for row in run.finished + aborted)
        run.assert_as_expected(*run.finished)
        for row in aborted:
            whole, _ = fake.expected(row, run.eos, run.limits.max_model_len)
            assert row.output_token_ids == whole[: len(row.output_token_ids)]
        num_aborted += len(aborted)
        num_preemptions += run.coordinator.stats.num_preemptions
        num_dropped += run.coordinator.stats.num_dropped_tokens
    assert num_preemptions > 0
    assert num_dropped > 0
    assert num_aborted > 0

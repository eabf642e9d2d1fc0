"""Random requests, limits, aborts, failures and pauses: no rule is broken and every token is right."""

import random
from collections import Counter
from types import ModuleType
from typing import Any

import pytest

from kvshard.runtime.coordinator.samples import Samples

NUM_WALKS = 240


def _limits(fake: ModuleType, chance: random.Random) -> Any:
    max_num_seqs = chance.choice([1, 2, 5, 8])
    max_model_len = chance.choice([30, 48])
    block_size = chance.choice([1, 3, 4, 16])
    num_longest = -(-max_model_len // block_size)
    windows = chance.choice([(None,), (None,), (None, 6), (None, 17, 4), (5,), (9, 3)])
    if None not in windows:  # as few as any row needs
        num_longest = min(num_longest, -(-max(windows) // block_size) + 1)
    return fake.make_limits(
        block_size=block_size,
        num_blocks=1 + num_longest + chance.choice([0, 2, num_longest]),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_seqs, chance.choice([1, 5, 16, 64])),
        run_ahead=chance.choice([0, 1, 2, 3]),
        cache_enabled=chance.random() < 0.8,
        prefix_caching=chance.random() < 0.9,
        windows=windows,
    )


def _published(run: Any) -> set[tuple[int, bytes]]:
    return {(group, name) for group, blocks in enumerate(run.blocks) for name in blocks._published}


def _prefix(fake: ModuleType, chance: random.Random, rows: list[Any]) -> list[int]:
    """What a prompt begins with: nothing, a piece of one of two texts, or what another row has so far."""
    source = chance.choice(["none", "text", "text", "row"])
    if source == "row" and rows:
        row = chance.choice(rows)
        tokens = row.prompt_token_ids + row.output_token_ids
    else:
        tokens = fake.make_tokens(chance.choice(["one", "two"]), 0 if source == "none" else 25)
    return tokens[: chance.randrange(0, 26)]


def _request(fake: ModuleType, chance: random.Random, name: str, rows: list[Any]) -> Any:
    max_tokens = chance.choice([1, 2, 7, 20, None])
    prefix = _prefix(fake, chance, rows)
    if chance.random() < 0.15:
        return fake.make_request(name, len(prefix) + chance.randrange(2, 5), prefix, task="score")
    return fake.make_request(
        name,
        n=chance.choice([1, 1, 1, 3]),
        num_prompt=max(chance.randrange(1, 28), len(prefix) + chance.randrange(0, 2), 1),
        prefix=prefix,
        max_tokens=max_tokens,
        min_tokens=0 if max_tokens is None else chance.randrange(0, max_tokens + 1),
        stop_token_ids=chance.sample(range(97), chance.choice([0, 0, 4])),
        ignore_eos=chance.random() < 0.3,
        seed=chance.choice([None, 3]),
        prompt_logprobs=chance.choice([None, None, None, 0, 2]),
    )


@pytest.mark.parametrize("first_seed", range(0, NUM_WALKS, 40))
def test_walk(fake: ModuleType, first_seed: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(first_seed, first_seed + 40):
        chance = random.Random(seed)
        run = fake.Run(_limits(fake, chance), eos=tuple(chance.sample(range(97), 3)))
        fails_at: dict[int, int] = {}  # by seed: the length from which on there is no token
        run.shards.without_token = lambda num_tokens, seed, at=fails_at: num_tokens >= at.get(seed, 1000)
        rows: list[Any] = []
        for _ in range(chance.randrange(10, 60)):
            action = chance.random()
            if action < 0.3 and len(rows) < 14:
                samples = Samples(_request(fake, chance, f"{seed} {len(rows)}", rows)).requests
                rows += samples
                if chance.random() < 0.1 and rows[-1].sampling.seed is None:
                    fails_at[rows[-1].seed] = chance.randrange(1, 40)
                run.add(*samples)
            elif action < 0.36 and rows:
                aborted = chance.choice(rows)
                run.coordinator.abort(aborted.request_id, aborted.sample_index)
                run.coordinator.check_integrity()
            else:
                before, num_in_flight = _published(run), run.coordinator._scheduler.num_sent
                num_failed = sum(row.error is not None for row in run.finished)
                run.step()
                if num_failed == sum(row.error is not None for row in run.finished) and num_in_flight > 0:
                    counts["evicted with plans in flight"] += len(before - _published(run))
        run.to_the_end()
        aborted = [row for row in rows if row.finish_reason == "abort"]
        failed = [row for row in rows if row.finish_reason == "error"]
        assert sorted(row.arrival for row in rows) == sorted(row.arrival for row in run.finished + aborted)
        run.assert_as_expected(*(row for row in run.finished if row not in failed))
        for row in aborted + failed:
            whole, _ = fake.expected(row, run.eos, run.limits.max_model_len, run.shards.windows)
            assert row.output_token_ids == whole[: len(row.output_token_ids)]
            fake.assert_prompt_as_expected(row, run.shards.windows)
        for row in failed:
            assert row.num_tokens == max(fails_at[row.seed], len(row.prompt_token_ids))
        counts["scored"] += sum(row.task == "score" for row in run.finished)
        stats = run.coordinator.stats
        counts["aborted"] += len(aborted)
        counts["failed"] += len(failed)
        counts["preempted"] += stats.num_preemptions
        counts["dropped"] += stats.num_dropped_tokens
        counts["found"] += stats.num_cached_prompt_tokens
    for what in (
        "aborted",
        "failed",
        "preempted",
        "dropped",
        "found",
        "evicted with plans in flight",
        "scored",
    ):
        assert counts[what] > 0, what

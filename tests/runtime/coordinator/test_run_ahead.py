"""Whatever the batching does, every request gets the tokens it would get alone."""

from types import ModuleType

import pytest


@pytest.fixture
def requests(fake: ModuleType) -> list:
    return [fake.make_request(f"row {i}", 3 + 7 * i % 40, max_tokens=5 + 3 * i % 25) for i in range(20)]


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_batched_tokens": 16},
        {"num_blocks": 22},
        {"num_blocks": 22, "max_num_batched_tokens": 9},
        {"cache_enabled": False},
        {"cache_enabled": False, "max_num_batched_tokens": 16, "num_blocks": 30},
        {"max_num_seqs": 1},
        {"block_size": 1, "num_blocks": 90},
        {"block_size": 64, "num_blocks": 4},
    ],
    ids=str,
)
def test_every_setting_gives_the_same_tokens(
    fake: ModuleType, requests: list, changes: dict, run_ahead: int
) -> None:
    run = fake.Run(fake.make_limits(**changes, run_ahead=run_ahead), eos=(5, 6))
    run.add(*requests)
    run.to_the_end()
    run.assert_as_expected(*requests)
    stats = run.coordinator.stats
    assert stats.max_plans_in_flight_ahead == run_ahead
    assert stats.num_output_tokens == sum(len(request.output_token_ids) for request in requests)
    assert stats.num_prompt_tokens == sum(len(request.prompt_token_ids) for request in requests)
    assert stats.num_preemptions == sum(request.num_preemptions for request in requests)
    if changes.get("num_blocks") == 22:
        assert stats.num_preemptions > 0
        assert stats.peak_used_layer_blocks == 21
    if changes.get("max_num_batched_tokens", 64) <= 16:
        assert stats.num_chunked_prompts > 0


def test_a_token_in_flight_is_taken_from_the_device(fake: ModuleType) -> None:
    for run_ahead in (0, 1):
        run = fake.Run(fake.make_limits(run_ahead=run_ahead))
        run.add(fake.make_request("a", 5, max_tokens=6))
        run.to_the_end()
        decodes = run.shards.plans[1:]
        assert len(decodes) == 5
        assert all(plan.row_from_device.all() == bool(run_ahead) for plan in decodes)


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_no_more_tokens_are_sampled_than_allowed(fake: ModuleType, run_ahead: int) -> None:
    run = fake.Run(fake.make_limits(run_ahead=run_ahead))
    request = fake.make_request("a", 5, max_tokens=6)
    run.add(request)
    run.to_the_end()
    assert sum(plan.num_rows for plan in run.shards.plans) == 6
    assert run.coordinator.stats.num_dropped_tokens == 0
    run.assert_as_expected(request)


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
@pytest.mark.parametrize("ending", ["eos", "stop token", "stop string"])
def test_an_end_that_lands_with_plans_in_flight(fake: ModuleType, ending: str, run_ahead: int) -> None:
    alone = fake.make_request("a", 6, max_tokens=12)
    full, _ = fake.expected(alone, (), 200)
    end = next(i for i in range(4, 12) if full[i] not in full[:i])
    sampling: dict = {"max_tokens": 100}
    eos: tuple[int, ...] = ()
    if ending == "eos":
        eos = (full[end],)
    elif ending == "stop token":
        sampling["stop_token_ids"] = [full[end]]
    else:
        text = fake.LetterTokenizer().decode(full[end - 1 : end + 1], skip_special_tokens=True)
        sampling["stop"] = [text]
    run = fake.Run(fake.make_limits(run_ahead=run_ahead), eos, fake.LetterTokenizer())
    request = fake.make_request("a", 6, **sampling)
    other = fake.make_request("other", 9, max_tokens=30, ignore_eos=True)
    run.add(request, other)
    while not run.step():
        pass
    assert run.finished == [request]
    assert request.output_token_ids == full[: end + 1]
    assert (request.finish_reason, request.num_tokens) == ("stop", 6 + end + 1)
    # The plans in flight hold the row: its blocks stay its own until they are back.
    assert bool(request.block_tables) == (run_ahead > 0)
    for _ in range(run_ahead):
        assert request.block_tables
        run.step()
    assert not request.block_tables
    run.to_the_end()
    assert run.coordinator.stats.num_dropped_tokens == run_ahead
    assert other.output_token_ids == fake.expected(other, (), 200)[0]


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_abort_with_plans_in_flight(fake: ModuleType, run_ahead: int) -> None:
    run = fake.Run(fake.make_limits(run_ahead=run_ahead, max_num_seqs=2, num_blocks=20))
    rows = [fake.make_request(name, 9, max_tokens=30) for name in "abc"]
    run.add(*rows)
    for _ in range(4):
        run.step()
    assert run.coordinator.abort("a") is rows[0]
    run.coordinator.check_integrity()
    assert rows[0].finish_reason == "abort"
    assert bool(rows[0].block_tables) == (run_ahead > 0)
    assert run.coordinator.abort("a") is None
    run.to_the_end()
    assert run.finished == [rows[1], rows[2]]
    run.assert_as_expected(*rows[1:])
    full, _ = fake.expected(rows[0], (), 200)
    assert rows[0].output_token_ids == full[: len(rows[0].output_token_ids)]
    assert len(rows[0].output_token_ids) == 4
    assert run.coordinator.stats.num_dropped_tokens == run_ahead


def test_abort_of_a_waiting_request(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits(max_num_seqs=1))
    rows = [fake.make_request(name, 9, max_tokens=3) for name in "abc"]
    run.add(*rows)
    run.step()
    assert run.coordinator.num_waiting == 2
    run.coordinator.abort("b")
    assert run.coordinator.num_waiting == 1
    run.to_the_end()
    assert run.finished == [rows[0], rows[2]]
    assert rows[1].output_token_ids == []
    assert run.coordinator.abort("b") is None


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_preemption_keeps_the_tokens_in_flight(fake: ModuleType, run_ahead: int) -> None:
    """Two rows grow until one has to give way while its tokens are in flight."""
    run = fake.Run(fake.make_limits(run_ahead=run_ahead, num_blocks=12))
    rows = [fake.make_request(name, 12, max_tokens=25, logprobs=0) for name in "ab"]
    run.add(*rows)
    known: list[int] = []
    while not rows[1].num_preemptions:
        known = list(rows[1].output_token_ids)
        run.step()
    assert rows[0].num_preemptions == 0
    for _ in range(run_ahead):
        assert rows[1].status == "waiting"
        run.step()
    assert rows[1].status == "waiting"
    assert len(rows[1].output_token_ids) == len(known) + run_ahead
    assert rows[1].output_token_ids[: len(known)] == known
    first_token_s = rows[1].first_token_s
    run.to_the_end()
    assert rows[1].first_token_s == first_token_s
    run.assert_as_expected(*rows)
    assert run.coordinator.stats.num_dropped_tokens == 0
    for row in rows:
        known = row.prompt_token_ids + row.output_token_ids
        expected = [fake.next_token(known[:n], row.seed)[1] for n in range(12, len(known))]
        assert [place[0].logprob for place in row.output_logprobs.places()] == pytest.approx(expected)


def test_a_preempted_row_may_end_by_a_token_in_flight(fake: ModuleType) -> None:
    """The end of the row lands between its preemption and its return to a slot."""
    probe = fake.Run(fake.make_limits(run_ahead=1, num_blocks=12))
    rows = [fake.make_request(name, 12, max_tokens=25) for name in "ab"]
    probe.add(*rows)
    while not rows[1].num_preemptions:
        probe.step()
    probe.step()
    last = len(rows[1].output_token_ids)

    run = fake.Run(fake.make_limits(run_ahead=1, num_blocks=12))
    rows = [fake.make_request("a", 12, max_tokens=25), fake.make_request("b", 12, max_tokens=25)]
    eos = rows[1].__class__.new("b", rows[1].prompt_token_ids, rows[1].sampling)
    full, _ = fake.expected(eos, (), 200)
    assert full[last - 1] not in full[: last - 1]
    ending = fake.make_request("b", 12, max_tokens=25, stop_token_ids=[full[last - 1]])
    run.add(rows[0], ending)
    run.to_the_end()
    assert ending.num_preemptions == 1
    assert ending.output_token_ids == full[:last]
    assert run.coordinator.stats.num_token_steps == 12 + 24 + 12 + last - 1
    run.assert_as_expected(rows[0])


def test_a_row_waits_for_blocks_that_are_about_to_come_back(fake: ModuleType) -> None:
    """Row b needs a block when the only ones to spare belong to a, ended but still in a plan in flight."""
    ending = fake.expected(fake.make_request("a", 12, max_tokens=2), (), 200)[0][1]
    run = fake.Run(fake.make_limits(run_ahead=1, num_blocks=10))
    rows = [
        fake.make_request("a", 12, max_tokens=20, stop_token_ids=[ending]),
        fake.make_request("b", 14, max_tokens=6),
        fake.make_request("c", 1, max_tokens=4),
    ]
    run.add(*rows)
    while rows[0].status != "finished":
        run.step()
    assert run.coordinator._scheduler.blocks.num_free == 0
    assert len(rows[1].block_tables[0]) == 4
    run.step()
    assert not rows[0].block_tables
    run.to_the_end()
    assert run.coordinator.stats.num_preemptions == 0
    run.assert_as_expected(*rows)


def test_without_cache_the_whole_sequence_is_computed_each_step(fake: ModuleType) -> None:
    token_steps = {}
    for cache_enabled in (True, False):
        limits = fake.make_limits(cache_enabled=cache_enabled, max_num_batched_tokens=200)
        run = fake.Run(limits)
        request = fake.make_request("a", 1, max_tokens=100)
        run.add(request)
        run.to_the_end()
        run.assert_as_expected(request)
        assert run.coordinator.stats.num_preemptions == 0
        token_steps[cache_enabled] = run.coordinator.stats.num_token_steps
    assert token_steps == {True: 100, False: 5050}

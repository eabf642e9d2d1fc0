"""Admission, order, limits, times."""

from types import ModuleType
from typing import Any

import pytest

from kvshard.runtime.config import parse_config
from kvshard.runtime.coordinator.limits import Limits
from kvshard.runtime.coordinator.logits_rules import LogitsRules
from kvshard.runtime.coordinator.request import Request, request_seed
from kvshard.runtime.errors import RequestError
from kvshard.runtime.models.spec import LayerGroup
from kvshard.runtime.sampling_params import SamplingParams


def test_limits_come_from_the_job_file() -> None:
    config = parse_config(
        {
            "model": "demo",
            "cache": {"block_size": 32, "enabled": False, "prefix_caching": False},
            "scheduler": {"max_num_seqs": 3, "max_num_batched_tokens": 77, "run_ahead": 2},
        },
        "test",
    )
    groups = (LayerGroup(None, 5), LayerGroup(7, 1))
    sizes = {"num_blocks": 9, "max_model_len": 500, "layer_groups": groups}
    assert Limits.from_config(config, **sizes) == Limits(
        num_blocks=9,
        block_size=32,
        max_model_len=500,
        max_num_seqs=3,
        max_num_batched_tokens=77,
        run_ahead=2,
        cache_enabled=False,
        prefix_caching=False,
        layer_groups=groups,
    )
    defaults = Limits.from_config(parse_config({"model": "demo"}, "test"), **sizes)
    assert defaults.cache_enabled
    assert defaults.prefix_caching


@pytest.mark.parametrize(
    ("num_prompt", "sampling", "parts"),
    [
        (0, {}, ["the prompt is empty"]),
        (200, {}, ["200 prompt tokens", "200 in all", "scheduler.max_model_len"]),
        (60, {"max_tokens": 23}, ["60 prompt + 23 new tokens", "21 blocks of 4", "has 20", "num_blocks=21"]),
        (
            60,
            {"max_tokens": None},
            ["60 prompt + 140 new tokens", "50 blocks", "set max_tokens to 21 at most"],
        ),
        (
            80,
            {"max_tokens": 2},
            ["80 prompt + 2 new tokens", "set max_tokens to 1 at most or raise cache.num_blocks"],
        ),
        (81, {"max_tokens": 1}, ["81 prompt + 1 new", "shorten the prompt or raise cache.num_blocks"]),
        (5, {"stop": ["x"]}, ["stop strings need a tokenizer"]),
    ],
)
def test_a_request_that_can_never_run_is_refused_with_the_numbers(
    fake: ModuleType, num_prompt: int, sampling: dict, parts: list[str]
) -> None:
    run = fake.Run(fake.make_limits(num_blocks=21))
    request = fake.make_request("q17", num_prompt, **sampling)
    with pytest.raises(RequestError) as error:
        run.add(request)
    for part in ['"q17"', *parts]:
        assert part in str(error.value)
    assert not run.coordinator.has_work
    fits = fake.make_request("q17", 60, max_tokens=21)
    run.add(fits)
    run.to_the_end()
    run.assert_as_expected(fits)


def test_the_largest_request_that_fits_runs(fake: ModuleType) -> None:
    """The last token is never written: 60 + 21 tokens are 80 places, all that 20 blocks have."""
    run = fake.Run(fake.make_limits(num_blocks=21, run_ahead=3))
    rows = [fake.make_request(name, 60, max_tokens=21) for name in "abc"]
    run.add(*rows)
    run.to_the_end()
    run.assert_as_expected(*rows)
    assert run.coordinator.stats.peak_used_layer_blocks == 20


@pytest.mark.parametrize("max_tokens", [None, 500])
def test_output_ends_at_max_model_len(fake: ModuleType, max_tokens: int | None) -> None:
    run = fake.Run(fake.make_limits(max_model_len=30))
    request = fake.make_request("a", 20, max_tokens=max_tokens)
    run.add(request)
    run.to_the_end()
    assert len(request.output_token_ids) == 10
    assert request.finish_reason == "length"
    run.assert_as_expected(request)


def test_an_id_is_taken_until_its_request_has_ended(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits())
    run.add(fake.make_request("a", 5, max_tokens=2))
    with pytest.raises(RequestError, match='"a": another one with this id'):
        run.add(fake.make_request("a", 5, max_tokens=2))
    run.to_the_end()
    run.add(fake.make_request("a", 5, max_tokens=2))
    run.to_the_end()
    assert len(run.finished) == 2


def test_requests_are_admitted_in_the_order_of_arrival(fake: ModuleType) -> None:
    """A long prompt at the head of the queue is not overtaken by short ones that would fit."""
    run = fake.Run(fake.make_limits(num_blocks=30, max_num_seqs=4))
    sizes = [60, 80, 4, 4, 4]
    rows = [fake.make_request(str(i), size, max_tokens=8) for i, size in enumerate(sizes)]
    run.add(*rows)
    run.to_the_end()
    admitted = [row.admitted_s for row in rows]
    assert admitted == sorted(admitted)
    run.assert_as_expected(*rows)


def test_admission_leaves_a_block_for_rows_that_run(fake: ModuleType) -> None:
    """Both would fit just now, and one of them would be preempted a moment later."""
    for num_blocks, together in ((8, False), (9, True)):
        run = fake.Run(fake.make_limits(num_blocks=num_blocks))
        rows = [fake.make_request("a", 11, max_tokens=3), fake.make_request("b", 15, max_tokens=2)]
        run.add(*rows)
        run.to_the_end()
        assert (rows[1].admitted_s < rows[0].finished_s) == together
        assert run.coordinator.stats.num_preemptions == 0


def test_no_row_is_starved(fake: ModuleType) -> None:
    """A long row among a stream of short ones in a tight cache ends, and the oldest is never preempted."""
    run = fake.Run(fake.make_limits(num_blocks=24, max_num_seqs=6, run_ahead=1))
    long_row = fake.make_request("long", 20, max_tokens=60)
    run.add(fake.make_request("first", 8, max_tokens=10), long_row)
    num_added = 0
    while long_row.status != "finished":
        while run.coordinator.num_waiting < 3:
            run.add(fake.make_request(f"short {num_added}", 8, max_tokens=12))
            num_added += 1
        run.step()
        assert len(run.shards.plans) < 300
    run.assert_as_expected(long_row)
    assert run.coordinator.stats.num_preemptions > 0
    run.to_the_end()
    run.assert_as_expected(*run.finished)


def test_decodes_come_first_and_prompts_use_what_is_left(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits(max_num_batched_tokens=8, run_ahead=0))
    run.add(fake.make_request("a", 6, max_tokens=8), fake.make_request("b", 17, max_tokens=8))
    run.to_the_end()
    rows = [
        list(zip(p.row_slots.tolist(), p.row_num_new_tokens.tolist(), strict=True)) for p in run.shards.plans
    ]
    assert rows[:4] == [[(0, 6), (1, 2)], [(0, 1), (1, 7)], [(0, 1), (1, 7)], [(0, 1), (1, 1)]]
    assert [plan.row_samples.tolist() for plan in run.shards.plans[:4]] == [
        [True, False],
        [True, False],
        [True, False],
        [True, True],
    ]
    assert run.coordinator.stats.num_chunked_prompts == 1


def test_slots_are_reused(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits(max_num_seqs=2, run_ahead=3), eos=(1, 2, 3, 4))
    rows = [fake.make_request(str(i), 5, max_tokens=20) for i in range(12)]
    run.add(*rows)
    run.to_the_end()
    run.assert_as_expected(*rows)
    assert sum(len(plan.opened) for plan in run.shards.plans) == 12
    assert {slot for plan in run.shards.plans for slot in plan.row_slots.tolist()} == {0, 1}


def test_times_and_their_differences(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits(max_num_seqs=1, run_ahead=0))
    rows = [fake.make_request(name, 5, max_tokens=5) for name in "ab"]
    run.add(*rows)
    assert rows[0].ttft_ms is None
    run.to_the_end()
    for row in rows:
        assert row.arrived_s is not None
        assert row.arrived_s < row.admitted_s < row.first_token_s < row.finished_s
        assert row.ttft_ms == (row.first_token_s - row.admitted_s) * 1e3
        assert row.tpot_ms == (row.finished_s - row.first_token_s) * 1e3 / 4
    assert rows[1].admitted_s > rows[0].finished_s
    one = fake.make_request("one", 5, max_tokens=1)
    run.add(one)
    run.to_the_end()
    assert one.tpot_ms is None


def test_min_tokens_keeps_ends_away_but_not_the_length(fake: ModuleType) -> None:
    eos = tuple(range(0, 97, 3))
    run = fake.Run(fake.make_limits(), eos)
    rows = [
        fake.make_request("a", 5, max_tokens=50, min_tokens=20),
        fake.make_request("b", 5, max_tokens=50, min_tokens=20, stop_token_ids=list(range(1, 97, 3))),
        fake.make_request("c", 5, max_tokens=20, min_tokens=20),
        fake.make_request("d", 5, max_tokens=20, ignore_eos=True),
    ]
    run.add(*rows)
    run.to_the_end()
    run.assert_as_expected(*rows)
    assert [row.finish_reason for row in rows] == ["stop", "stop", "length", "length"]
    assert all(len(row.output_token_ids) > 20 for row in rows[:2])


def test_what_shards_are_told_to_sample() -> None:
    sampling = SamplingParams(temperature=0.7, top_k=-1, top_p=0.9, min_p=0.1, logprobs=0)
    slot = Request.new("a", [1, 2, 3], sampling).slot_sampling((9,))
    assert (slot.temperature, slot.top_k, slot.top_p, slot.min_p) == (0.7, 0, 0.9, 0.1)
    assert slot.logprobs == 0
    assert slot.stop_ids == ()
    greedy = SamplingParams(
        temperature=1e-6, top_k=5, top_p=0.5, min_p=0.2, min_tokens=4, stop_token_ids=(7,)
    )
    slot = Request.new("a", [1, 2, 3], greedy).slot_sampling((9,))
    assert slot.greedy
    assert (slot.top_k, slot.top_p, slot.min_p) == (0, 1.0, 0.0)
    assert (slot.stop_ids, slot.stop_from) == ((9, 7), 7)
    ignoring = greedy.model_copy(update={"ignore_eos": True})
    assert Request.new("a", [1], ignoring).slot_sampling((9,)).stop_ids == (7,)


def test_shards_get_as_much_of_the_sequence_as_the_rules_need() -> None:
    def rules_of(bad_words: tuple[tuple[int, ...], ...] = (), **sampling: Any) -> LogitsRules | None:
        request = Request.new("a", [5, 3, 5], SamplingParams(**sampling), bad_word_ids=bad_words)
        request.output_token_ids = [7, 8, 8, 9]
        return request.slot_sampling(()).rules

    assert rules_of(temperature=0.5, stop=["x"], min_tokens=3) is None
    assert rules_of(presence_penalty=1) == LogitsRules(presence_penalty=1.0, output_ids=(7, 8, 8, 9))
    assert rules_of(((1,), (1, 2, 3)), frequency_penalty=-1) == LogitsRules(
        frequency_penalty=-1.0, bad_words=((1,), (1, 2, 3)), output_ids=(7, 8, 8, 9)
    )
    repetition = rules_of(repetition_penalty=2)
    assert repetition is not None
    assert sorted(repetition.prompt_ids) == [3, 5]
    assert rules_of(((1,), (1, 2, 3))) == LogitsRules(bad_words=((1,), (1, 2, 3)), output_ids=(8, 9))
    assert rules_of(((1,),)) == LogitsRules(bad_words=((1,),))
    assert rules_of(logit_bias={4: 2}, allowed_token_ids=(4, 5)) == LogitsRules(
        logit_bias=((4, 2.0),), allowed_token_ids=(4, 5)
    )


def test_bad_words_without_tokens_are_refused(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits(), (), fake.LetterTokenizer())
    with pytest.raises(RequestError, match='request "a": bad_words need a tokenizer'):
        run.add(fake.make_request("a", 6, bad_words=["x"]))


def test_seeds() -> None:
    none, five = SamplingParams(), SamplingParams(seed=5)
    assert request_seed(five, 1, "a") == request_seed(five, 2, "b") == 5
    seeds = {request_seed(none, job, name) for job in (0, 1) for name in ("a", "b", "")}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert request_seed(none, 0, "a") == request_seed(none, 0, "a")
    assert request_seed(SamplingParams(seed=-1), 0, "a") == 2**64 - 1

"""Rows that end or are preempted while a plan that holds them is in flight, with NaN in every block given up."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_models import make_family_model
from models_factory import make_llama
from poisoned_cache import NUM_TOKENS, OneLetterEach, PoisoningExecutor, generate, start

from kvshard.runtime.coordinator.loop import Coordinator
from kvshard.runtime.coordinator.plan import StepPlan
from kvshard.runtime.coordinator.request import Request
from kvshard.runtime.coordinator.samples import Samples
from kvshard.runtime.sampling_params import SamplingParams

SHARED = [88, 4, 31, 70, 12, 3, 56, 9, 41, 27, 66]  # its first 8 tokens are two blocks
PROMPTS = {"a": [5, 17, 99, 3, 42], "b": [61, 2, 30, 8, 8, 19, 77], "c": [9, 54, 12]}


@pytest.fixture(scope="module", params=["full attention", "windows"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layers with full attention, or one of two with a window: two layer groups, each with its own blocks."""
    path = tmp_path_factory.mktemp("model")
    if request.param == "full attention":
        return make_llama(path)
    # A row takes a block at a multiple of 4: with a window of 6 it then still sees the last token of another one, which
    # would show if that were given up a token too soon.
    make_family_model("qwen2_windows", sliding_window=6).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, list[int]]:
    """Each prompt run by itself, nothing in flight."""
    tokens = {}
    for name, prompt in PROMPTS.items():
        coordinator = start(model, run_ahead=0)
        tokens[name] = generate(coordinator, {name: prompt})[name].output_token_ids
    return tokens


def test_poison_is_read_where_the_table_is_wrong(model: Path) -> None:
    """The poison bites: a plan whose row points at a block it does not own gives no token."""
    coordinator = start(model)
    executor = coordinator._executor
    assert isinstance(executor, PoisoningExecutor)
    wrong = executor._follow

    def follow_and_forget(plan: StepPlan) -> list[set[int]]:
        empty = wrong(plan)
        for tables in executor._tables.values():
            tables[0].clear()
        return empty

    executor._follow = follow_and_forget  # type: ignore[method-assign]
    request = generate(coordinator, {"a": PROMPTS["a"]})["a"]
    assert request.finish_reason == "error"
    assert "not finite" in str(request.error)


@pytest.mark.parametrize("name", PROMPTS)
def test_eos_while_in_flight(model: Path, alone: dict[str, list[int]], name: str) -> None:
    eos = alone[name][6]
    coordinator = start(model, eos=(eos,))
    requests = generate(coordinator, PROMPTS)
    assert coordinator.stats.max_plans_in_flight_ahead == 1
    assert coordinator.stats.num_dropped_tokens > 0
    for other, request in requests.items():
        expected = alone[other]
        if eos in expected:
            expected = expected[: expected.index(eos) + 1]
            assert request.finish_reason == "stop"
        assert request.output_token_ids == expected


def test_stop_string_while_in_flight(model: Path, alone: dict[str, list[int]]) -> None:
    text = OneLetterEach().decode(alone["b"])
    stop = text[7:9]
    coordinator = start(model)
    sampling = {"b": SamplingParams(temperature=0, max_tokens=NUM_TOKENS, stop=(stop,))}
    requests = generate(coordinator, PROMPTS, sampling)
    assert coordinator.stats.num_dropped_tokens > 0
    assert requests["b"].text == text[: text.index(stop)]
    assert requests["b"].stop_reason == stop
    for other in ("a", "c"):
        assert requests[other].output_token_ids == alone[other]


def test_abort_while_in_flight(model: Path, alone: dict[str, list[int]]) -> None:
    coordinator = start(model)

    def abort(step: int, requests: dict[str, Request]) -> None:
        if step == 5:
            coordinator.abort("a")

    requests = generate(coordinator, PROMPTS, after_step=abort)
    assert requests["a"].finish_reason == "abort"
    num_tokens = len(requests["a"].output_token_ids)
    assert 0 < num_tokens < NUM_TOKENS
    assert requests["a"].output_token_ids == alone["a"][:num_tokens]
    assert coordinator.stats.num_dropped_tokens > 0
    for other in ("b", "c"):
        assert requests[other].output_token_ids == alone[other]


@pytest.mark.parametrize("run_ahead", [1, 3])
def test_preemption_while_in_flight(model: Path, alone: dict[str, list[int]], run_ahead: int) -> None:
    coordinator = start(model, run_ahead=run_ahead, num_blocks=13)
    requests = generate(coordinator, PROMPTS)
    assert coordinator.stats.num_preemptions > 0
    assert coordinator.stats.max_plans_in_flight_ahead == run_ahead
    for name, request in requests.items():
        assert request.output_token_ids == alone[name]


def test_all_at_once_leaves_nothing_behind(model: Path, alone: dict[str, list[int]]) -> None:
    """Rows end in all these ways side by side, over and over, in a cache too small for them."""
    rng = np.random.default_rng(0)
    coordinator = start(model, num_blocks=14)
    prompts = {f"{name}{i}": prompt for i in range(6) for name, prompt in PROMPTS.items()}
    sampling = {
        name: SamplingParams(temperature=0, max_tokens=int(rng.integers(1, NUM_TOKENS + 1)))
        for name in prompts
    }

    def abort_some(step: int, requests: dict[str, Request]) -> None:
        running = [name for name, request in requests.items() if request.status == "running"]
        if running and step % 7 == 3:
            coordinator.abort(str(rng.choice(running)))

    requests = generate(coordinator, prompts, sampling, abort_some)
    assert coordinator.stats.num_preemptions > 0
    assert {request.finish_reason for request in requests.values()} == {"abort", "length"}
    for name, request in requests.items():
        assert request.output_token_ids == alone[name[0]][: len(request.output_token_ids)]


def test_penalties_see_tokens_that_the_host_does_not_know(model: Path) -> None:
    """So strong that no token may come twice: one that is counted a step late would."""
    penalized = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, repetition_penalty=1e6)
    coordinator = start(model, run_ahead=3)
    requests = generate(coordinator, PROMPTS, dict.fromkeys(PROMPTS, penalized))
    assert coordinator.stats.max_plans_in_flight_ahead == 3
    for request in requests.values():
        assert len(set(request.output_token_ids)) == NUM_TOKENS
        assert not set(request.output_token_ids) & set(request.prompt_token_ids)


def test_a_bad_word_is_seen_in_tokens_that_the_host_does_not_know(
    model: Path, alone: dict[str, list[int]]
) -> None:
    words = tuple(tuple(tokens[first : first + 3]) for tokens in alone.values() for first in (2, 6))
    requests = generate(start(model, run_ahead=3), PROMPTS, bad_word_ids=words)
    for name, request in requests.items():
        tokens = request.output_token_ids
        assert tokens[:4] == alone[name][:4]
        assert tokens != alone[name]
        assert not {tuple(tokens[i : i + 3]) for i in range(NUM_TOKENS)} & set(words)


@pytest.mark.parametrize("run_ahead", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.7, "repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "logit_bias": {8: 1.0, 99: -1.0}},
        {"allowed_token_ids": tuple(range(20, 40)), "frequency_penalty": 0.5},
        pytest.param(
            {"stop_token_ids": tuple(range(20, 101)), "min_tokens": NUM_TOKENS - 2}, id="min_tokens"
        ),
    ],
    ids=str,
)
def test_a_preempted_row_goes_on_with_its_counts(
    model: Path, settings: dict[str, Any], run_ahead: int
) -> None:
    sampling = {
        name: SamplingParams(temperature=0.3, seed=index, max_tokens=NUM_TOKENS, **settings)
        for index, name in enumerate(PROMPTS)
    }
    words = ((8, 8), (19, 77, 3), (30,))
    undisturbed = {
        name: generate(start(model, run_ahead=0), {name: PROMPTS[name]}, sampling, bad_word_ids=words)[name]
        for name in PROMPTS
    }
    plain = [SamplingParams(temperature=0.3, seed=index, max_tokens=NUM_TOKENS) for index in range(3)]
    without = generate(start(model), PROMPTS, dict(zip(PROMPTS, plain, strict=True)))
    coordinator = start(model, run_ahead=run_ahead, num_blocks=13)
    requests = generate(coordinator, PROMPTS, sampling, bad_word_ids=words)
    assert coordinator.stats.num_preemptions > 0
    for name, request in requests.items():
        assert request.output_token_ids == undisturbed[name].output_token_ids
        assert request.output_token_ids != without[name].output_token_ids


@pytest.mark.parametrize("run_ahead", [0, 3])
def test_a_preempted_row_goes_on_with_the_beginning_of_a_bad_word(model: Path, run_ahead: int) -> None:
    """Any token and then 8 is one, and 8 is by far the most likely: it comes first and never again."""
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logit_bias={8: 100.0})
    words = tuple((token_id, 8) for token_id in range(101))
    coordinator = start(model, run_ahead=run_ahead, num_blocks=13)
    requests = generate(coordinator, PROMPTS, dict.fromkeys(PROMPTS, sampling), bad_word_ids=words)
    assert coordinator.stats.num_preemptions > 0
    for request in requests.values():
        assert [token_id == 8 for token_id in request.output_token_ids] == [True] + [False] * (NUM_TOKENS - 1)


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
@pytest.mark.parametrize("num_blocks", [40, 14])
def test_a_shared_prefix_while_in_flight(model: Path, run_ahead: int, num_blocks: int) -> None:
    """With 14 blocks rows are preempted and what is kept is evicted, all the while plans are in flight."""
    prompts = {name: SHARED + prompt for name, prompt in PROMPTS.items()}
    alone = {
        name: generate(start(model, run_ahead=0), {name: prompt})[name].output_token_ids
        for name, prompt in prompts.items()
    }
    coordinator = start(model, run_ahead=run_ahead, num_blocks=num_blocks)
    requests = generate(coordinator, {f"{name}{i}": prompts[name] for i in range(3) for name in prompts})
    assert coordinator.stats.num_cached_prompt_tokens >= 8 * 8
    assert (coordinator.stats.num_preemptions > 0) == (num_blocks == 14)
    for name, request in requests.items():
        assert request.output_token_ids == alone[name[0]]


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_shared_prefix_that_is_not_there_yields_no_token(model: Path, run_ahead: int) -> None:
    """The poison bites here too: once another row's plan has run, what nobody keeps is gone."""
    coordinator = start(model, run_ahead=run_ahead)
    executor = coordinator._executor
    assert isinstance(executor, PoisoningExecutor)
    executor.forget_published = True
    prompts = {"first": SHARED, "other": PROMPTS["a"], "again": SHARED}
    reasons = [generate(coordinator, {name: prompt})[name].finish_reason for name, prompt in prompts.items()]
    assert reasons == ["length", "length", "error"]


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_samples_go_on_from_a_copy_of_a_block_that_is_not_full(model: Path, cache_dtype: str) -> None:
    """Of 11 prompt tokens, the later ones find two blocks of 4, and copy 2 tokens; the last is always computed."""

    def samples() -> list[Request]:
        sampling = SamplingParams(n=3, temperature=0.7, seed=5, max_tokens=NUM_TOKENS)
        return Samples(Request.new("s", SHARED, sampling)).requests

    def run(requests: list[Request]) -> Coordinator:
        coordinator = start(model, cache_dtype=cache_dtype)
        for request in requests:
            coordinator.add(request)
        while coordinator.has_work:
            coordinator.step()
            coordinator.check_integrity()
        return coordinator

    together, alone = samples(), samples()
    assert run(together).stats.num_cached_prompt_tokens == 2 * 10
    for request in alone:
        run([request])
    assert [request.output_token_ids for request in together] == [
        request.output_token_ids for request in alone
    ]
    assert len({tuple(request.output_token_ids) for request in together}) == 3

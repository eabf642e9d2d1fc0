"""The same seed, prompt and settings: the same answer alone and in a batch, at every size and over every cache."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from alone import Alone, Row, generate, make_word_model, num_parted, open_llm, run_alone
from feature_rows import NUM_TOKENS, PLAIN, PROMPT, feature_rows

from kvshard import LLM

LONG = Row(PROMPT[::-1], PLAIN.settings | {"max_tokens": 2 * NUM_TOKENS})
CACHE_DTYPES = ("auto", "int8", "fp8", "int4")
Truth = Callable[[str], tuple[list[Row], list[list[Alone]]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 2: every second layer has a window, of 4 tokens; two KV heads."""
    return make_word_model(tmp_path_factory.mktemp("model"), "gemma2")


@pytest.fixture(scope="module")
def truth(model: Path) -> Truth:
    """By cache dtype, the rows and what each gives alone; the plain one comes first, and one to be aborted last."""

    def run(cache_dtype: str) -> tuple[list[Row], list[list[Alone]]]:
        [[plain]] = run_alone(model, [PLAIN], cache_dtype)
        rows = [PLAIN, *feature_rows(plain.answer.token_ids).values(), LONG]
        return rows, run_alone(model, rows, cache_dtype)

    return functools.cache(run)


def abort_when_begun(llm: LLM, request_id: str) -> None:
    """End that request once some of its tokens are there."""
    coordinator = llm._engine.coordinator
    step = coordinator.step

    def step_and_abort() -> object:
        ended = step()
        request = llm._live.get(request_id)
        if request is not None and len(request.output_token_ids) == NUM_TOKENS:
            llm.abort(request_id)
        return ended

    coordinator.step = step_and_abort  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    ("size", "cache_dtype"),
    [*((size, "auto") for size in (1, 2, 3, 5)), (3, "int8"), (5, "fp8"), (2, "int4")],
)
def test_answers_are_as_alone(size: int, cache_dtype: str, model: Path, truth: Truth) -> None:
    """Six query heads in two groups, in a batch with all that may disturb: a shared prompt, cut into chunks, in so few
    blocks that rows are preempted, with plans ahead, and one of the rows aborted."""
    rows, alone = truth(cache_dtype)
    with open_llm(
        model,
        size,
        cache={"dtype": cache_dtype, "block_size": 4, "num_blocks": 19},
        scheduler={"max_num_seqs": 4, "max_num_batched_tokens": 8, "run_ahead": 2, "max_model_len": 64},
    ) as llm:
        abort_when_begun(llm, str(len(rows) - 1))
        *outputs, aborted = generate(llm, rows)
        stats = llm._engine.coordinator.stats
    parted = [num_parted(got, expected, cache_dtype) for got, expected in zip(outputs, alone, strict=False)]
    assert sum(parted) <= 1, f"answers that left the truth at a near-tie, by row: {parted}"

    [ended], [whole] = aborted.outputs, alone[-1]
    assert ended.finish_reason == "abort"
    assert 0 < len(ended.token_ids) < len(whole.answer.token_ids)
    assert ended.token_ids == whole.answer.token_ids[: len(ended.token_ids)]

    assert stats.num_cached_prompt_tokens > 0
    assert stats.num_chunked_prompts > 0
    assert stats.num_preemptions > 0
    assert stats.max_plans_in_flight_ahead == 2


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_every_setting_is_felt(cache_dtype: str, truth: Truth) -> None:
    """What is compared above would differ if a setting were left out."""
    rows, alone = truth(cache_dtype)
    plain, *others = [answers[0].answer for answers in alone[:-1]]
    names = feature_rows(plain.token_ids)
    assert rows[1:-1] == list(names.values())
    for name, answer in zip(names, others, strict=True):
        if name == "logprobs":
            assert answer.token_ids == plain.token_ids
            assert answer.logprobs is not None
        else:
            assert answer.token_ids != plain.token_ids, name
    tokens = dict(zip(names, (answer.token_ids for answer in others), strict=True))
    assert (
        others[list(names).index("stop")].stop_reason
        == rows[1 + list(names).index("stop")].settings["stop"][0]
    )
    assert plain.token_ids[1] not in tokens["bad_words"]
    assert set(tokens["allowed_token_ids"]) <= set(range(20, 60))
    assert len(tokens["stop_token_ids"]) == 6
    assert len(tokens["min_tokens"]) >= NUM_TOKENS - 2

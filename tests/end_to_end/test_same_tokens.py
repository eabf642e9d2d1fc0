"""The same seed, prompt and settings: the same answer alone and in a batch, at every size and over every cache."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from alone import Alone, Row, make_word_model, num_parted, open_llm, run_alone
from feature_rows import NUM_TOKENS, PLAIN, PROMPT, UNCHANGED, feature_rows, rows_without_one

from kvshard import LLM, SamplingParams
from kvshard.launch.outputs import RequestOutput

BLOCK_SIZE = 4
# Begins with what is the second block of the other prompts, and must not be taken for it.
LONG = Row(PROMPT[BLOCK_SIZE:], PLAIN.settings | {"max_tokens": 2 * NUM_TOKENS})
CACHE_DTYPES = ("auto", "int8", "fp8", "int4")
Truth = Callable[[str], tuple[list[Row], list[list[Alone]]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 2: every second layer has a window, of 4 tokens; two KV heads."""
    return make_word_model(tmp_path_factory.mktemp("model"), "gemma2")


@pytest.fixture(scope="module")
def truth(model: Path) -> Truth:
    """By cache dtype, the rows and what each gives alone; one to be aborted comes first, then the plain one."""

    def run(cache_dtype: str) -> tuple[list[Row], list[list[Alone]]]:
        [[plain]] = run_alone(model, [PLAIN], cache_dtype)
        rows = [LONG, PLAIN, *feature_rows(plain.answer.token_ids).values()]
        return rows, run_alone(model, rows, cache_dtype)

    return functools.cache(run)


def generate_and_abort(llm: LLM, rows: list[Row]) -> list[RequestOutput]:
    """The first row is aborted when another has ended."""
    prompts = [{"prompt_token_ids": row.prompt} for row in rows]
    outputs = []
    for output in llm.generate(prompts, [SamplingParams(**row.settings) for row in rows], stream=True):
        outputs.append(output)
        llm.abort("0")
    return sorted(outputs, key=lambda output: output.prompt_index)


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
        cache={"dtype": cache_dtype, "block_size": BLOCK_SIZE, "num_blocks": 19},
        scheduler={"max_num_seqs": 4, "max_num_batched_tokens": 8, "run_ahead": 2, "max_model_len": 64},
    ) as llm:
        aborted, *outputs = generate_and_abort(llm, rows)
        stats = llm._engine.coordinator.stats
    parted = [
        num_parted(got, expected, cache_dtype) for got, expected in zip(outputs, alone[1:], strict=True)
    ]
    assert sum(parted) <= 1, f"answers that left the truth at a near-tie, by row: {parted}"

    [ended], [whole] = aborted.outputs, alone[0]
    assert ended.finish_reason == "abort"
    assert 0 < len(ended.token_ids) < len(whole.answer.token_ids)
    assert ended.token_ids == whole.answer.token_ids[: len(ended.token_ids)]

    assert stats.num_cached_prompt_tokens > 0
    assert stats.num_chunked_prompts > 0
    assert stats.num_preemptions > 0
    assert stats.max_plans_in_flight_ahead == 2


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_every_setting_is_felt(cache_dtype: str, model: Path, truth: Truth) -> None:
    """What is compared above would differ if a setting were left out, also one of several."""
    rows, alone = truth(cache_dtype)
    [plain], *others = [[one.answer for one in answers] for answers in alone[1:]]
    names = list(feature_rows(plain.token_ids))
    answers = dict(zip(names, others, strict=True))
    assert dict(zip(names, rows[2:], strict=True)) == feature_rows(plain.token_ids)
    for name, (answer, *_) in answers.items():
        if name in UNCHANGED:
            assert answer.token_ids == plain.token_ids
        else:
            assert answer.token_ids != plain.token_ids, name
    tokens = {name: answer.token_ids for name, (answer, *_) in answers.items()}
    less = rows_without_one(feature_rows(plain.token_ids))
    for (name, setting), [one] in zip(less, run_alone(model, list(less.values()), cache_dtype), strict=True):
        assert one.answer.token_ids != tokens[name], (name, setting)
    assert len({tuple(answer.token_ids) for answer in answers["n"]}) == 3
    assert {len(place) for place in answers["logprobs"][0].logprobs or ()} <= {3, 4}
    of_prompt = dict(zip(names, alone[2:], strict=True))["prompt_logprobs"][0].prompt_logprobs
    assert of_prompt is not None
    assert [place is None for place in of_prompt] == [True] + [False] * (len(PROMPT) - 1)
    [stopped], [ended] = answers["stop"], answers["stop_token_ids"]
    assert [stopped.stop_reason] == feature_rows(plain.token_ids)["stop"].settings["stop"]
    assert plain.text.startswith(f"{stopped.text}{stopped.stop_reason}")
    assert (ended.text.split(), ended.stop_reason) == (plain.text.split()[:5], plain.token_ids[5])
    assert plain.token_ids[1] not in tokens["bad_words"]
    assert (
        tokens["longer_bad_words"][:6] == plain.token_ids[:6]
    )  # the last of its three tokens is another one
    assert set(tokens["allowed_token_ids"]) <= set(range(20, 60))
    assert len(tokens["stop_token_ids"]) == 6
    assert max(tokens["min_tokens"][:8]) < 20
    assert len(tokens["min_tokens"]) == 9

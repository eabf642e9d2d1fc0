"""Texts that are scored: every token but the first is told about, nothing is sampled, and nothing is kept."""

import math
from types import ModuleType
from typing import Any

import pytest

from kvshard.runtime.coordinator.scoring import score_of
from kvshard.runtime.errors import RequestError


def assert_scored(fake: ModuleType, *rows: Any) -> None:
    for row in rows:
        logprobs = [logprob for _, logprob, _ in fake.expected_prompt(row)]
        score = score_of(row)
        assert score is not None
        assert score.num_tokens == len(row.prompt_token_ids) - 1
        assert score.logprob_sum == pytest.approx(sum(logprobs), rel=1e-6)
        assert score.perplexity == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), rel=1e-6)


@pytest.mark.parametrize("cache_enabled", [True, False])
@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_texts_are_scored_beside_answers(fake: ModuleType, run_ahead: int, cache_enabled: bool) -> None:
    limits = fake.make_limits(max_num_batched_tokens=8, run_ahead=run_ahead, cache_enabled=cache_enabled)
    run = fake.Run(limits)
    texts = [fake.make_request(f"text {size}", size, task="score") for size in (2, 5, 9, 33, 200)]
    answer = fake.make_request("answer", 6, max_tokens=5)
    run.add(*texts[:3], answer, *texts[3:])
    run.to_the_end()
    run.assert_as_expected(*texts, answer)
    assert_scored(fake, *texts)
    assert score_of(answer) is None
    # No text's last token is run through the model.
    if cache_enabled:
        assert (
            run.coordinator.stats.num_token_steps - run.coordinator.stats.num_dropped_tokens == 249 - 5 + 10
        )


def test_a_text_gives_its_blocks_up_at_once_and_leaves_nothing_to_find(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits(run_ahead=0))
    text = fake.make_request("text", 20, task="score")
    run.add(text)
    [ended] = run.step()
    [blocks] = run.blocks
    assert ended is text
    assert (text.finish_reason, text.block_tables, blocks.num_used) == ("length", [], 0)
    assert not blocks._published
    again = fake.make_request("again", 20, text.prompt_token_ids, task="score")
    run.add(again)
    run.to_the_end()
    assert (run.coordinator.stats.num_steps, run.coordinator.stats.num_token_steps) == (2, 38)
    assert run.coordinator.stats.num_looked_up_prompt_tokens == 0


def test_a_preempted_text_is_told_each_token_once(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits(num_blocks=10, max_model_len=36, max_num_batched_tokens=3))
    text = fake.make_request("text", 24, task="score")
    run.add(fake.make_request("answer", 4, max_tokens=25), text)
    run.to_the_end()
    assert text.num_preemptions > 0
    assert_scored(fake, text)
    run.assert_as_expected(*run.finished)


def test_the_longest_text_fills_the_cache(fake: ModuleType) -> None:
    """Of 33 tokens 32 are run through the model: 8 blocks, which is all there are."""
    run = fake.Run(fake.make_limits(num_blocks=9, max_model_len=33))
    text = fake.make_request("text", 33, task="score")
    run.add(text)
    run.to_the_end()
    assert_scored(fake, text)


def test_an_aborted_text_has_no_score(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits(max_num_batched_tokens=8))
    text = fake.make_request("text", 30, task="score")
    run.add(text)
    run.step()
    run.coordinator.abort("text")
    run.to_the_end()
    assert text.prompt_logprobs
    assert score_of(text) is None


@pytest.mark.parametrize("length", [1, 9, 19])
def test_a_text_whose_logits_are_not_finite_fails_alone(fake: ModuleType, length: int) -> None:
    run = fake.Run(fake.make_limits(max_num_batched_tokens=8))
    texts = [fake.make_request(name, 20, task="score") for name in "ab"]
    run.shards.without_token = lambda num_tokens, seed: seed == texts[0].seed and num_tokens == length
    run.add(*texts)
    run.to_the_end()
    assert texts[0].finish_reason == "error"
    assert "not finite" in texts[0].error
    assert score_of(texts[0]) is None
    assert_scored(fake, texts[1])


def test_a_perplexity_beyond_all_floats_is_none(fake: ModuleType) -> None:
    text = fake.make_request("text", 2, task="score")
    text.prompt_logprobs = [fake.make_table([(5, -800.0)])]
    assert score_of(text).logprob_sum == -800
    assert score_of(text).perplexity is None


@pytest.mark.parametrize(
    ("num_tokens", "sampling", "message"),
    [
        (1, {}, 'request "t": the text is one token'),
        (0, {}, "the prompt is empty"),
        (34, {}, "the text has 34 tokens, the most is 33; shorten it or raise scheduler.max_model_len"),
        (30, {}, "30 tokens need 8 blocks of 4 tokens, the cache has 7"),
        (9, {"temperature": 0.5}, "temperature=0.5 has no meaning with task: score; leave it out"),
        (9, {"max_tokens": 1}, "max_tokens=1 has no meaning"),
        (9, {"logprobs": 0}, "logprobs=0 has no meaning"),
        (9, {"stop": "x"}, "stop="),
    ],
)
def test_refused(fake: ModuleType, num_tokens: int, sampling: dict[str, Any], message: str) -> None:
    run = fake.Run(fake.make_limits(num_blocks=8, max_model_len=33))
    with pytest.raises(RequestError) as refused:
        run.add(fake.make_request("t", num_tokens, task="score", **sampling))
    assert message in str(refused.value)
    run.add(fake.make_request("t", 9, task="score", prompt_logprobs=20, temperature=1.0))

"""Rows end with the token that completes a stop string, whatever their tokens are made of."""

import random
from typing import Any

import pytest

from kvshard.runtime.coordinator.detokenizer import INCOMPLETE
from kvshard.runtime.coordinator.request import Request
from kvshard.runtime.coordinator.stop import EndOfRequest
from kvshard.runtime.sampling_params import SamplingParams

from .toy_tokenizers import BYTE_TOKENS, TOKENIZERS, byte_ids, random_ids, whole_text


def _run(kind: str, prompt: list[int], ids: list[int], **sampling: Any) -> Request:
    """A request that samples `ids`, until it ends."""
    request = Request.new("a", prompt, SamplingParams(**sampling))
    request.max_len = len(prompt) + len(ids)
    end = EndOfRequest((), TOKENIZERS[kind], BYTE_TOKENS[kind])
    end.prepare(request)
    for token in ids:
        request.output_token_ids.append(token)
        request.finish_reason = end.reached(request)
        if request.finish_reason is not None:
            end.complete_text(request)
            return request
    raise AssertionError("it ended neither by a stop string nor by its length")


@pytest.mark.parametrize("included", [True, False])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("seed", range(12))
def test_rows_end_with_the_token_that_completes_a_stop_string(kind: str, seed: int, included: bool) -> None:
    chance = random.Random(seed)
    # A stop string in bytes that go on where the prompt broke off is only seen when they end.
    prompt = [*random_ids(kind, chance, 3), TOKENIZERS[kind].token_to_id("ords")]
    ids = random_ids(kind, chance, 120)
    text = whole_text(kind, prompt, ids, True).replace(INCOMPLETE, "") or "no text"
    starts = [chance.randrange(max(len(text) - 3, 1)) for _ in range(2)]
    stops = [text[start : start + chance.randrange(1, 4)] for start in starts]
    expected = None  # number of tokens, text
    for count in range(1, len(ids) + 1):
        so_far = whole_text(kind, prompt, ids[:count], True)
        hits = [(so_far.find(stop), stop) for stop in stops if stop in so_far]
        if hits:
            at, stop = min(hits, key=lambda hit: hit[0])
            expected = (count, so_far[: at + len(stop)] if included else so_far[:at], stop)
            break
    request = _run(kind, prompt, ids, stop=stops, include_stop_str_in_output=included)
    got = (len(request.output_token_ids), request.text, request.stop_reason)
    assert got == (expected or (len(ids), whole_text(kind, prompt, ids, True), None))


@pytest.mark.parametrize(
    ("stops", "text"), [(["s", "rd"], " wo"), (["rd", "s"], " wo"), (["ds", "s"], " wor")]
)
def test_the_first_of_several_within_one_token_counts(stops: list[str], text: str) -> None:
    ids = [TOKENIZERS["sentencepiece"].token_to_id(token) for token in ("▁words", "▁words")]
    assert _run("sentencepiece", ids[:1], ids, stop=stops).text == text


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram"])
def test_a_stop_string_of_bytes_ends_the_row_before_its_run_does(kind: str) -> None:
    request = _run(kind, [], byte_ids(kind, "ab日é")[:8] + [0xFF] * 9, stop=["日"])
    assert (request.text, len(request.output_token_ids)) == ("ab", 5)
    # Not at the beginning: the space that a sentence begins with is no part of it.
    request = _run(kind, [], [*byte_ids(kind, " "), *byte_ids(kind, "ab")], stop=[" a"])
    assert request.finish_reason == ("length" if kind == "sentencepiece" else "stop")


def test_min_tokens_counts_for_bytes_that_were_pending() -> None:
    """The stop string was there after 3 tokens; its run ends later."""
    ids = [*"日".encode(), TOKENIZERS["sentencepiece"].token_to_id("ords"), *"日".encode()]
    request = _run("sentencepiece", [], ids, stop=["日"], min_tokens=3)
    assert (request.text, len(request.output_token_ids)) == ("日ords", 7)

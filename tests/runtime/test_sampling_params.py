"""Settings of one request: which values are taken, and what is said of others."""

from typing import Any

import pytest
from pydantic import ValidationError

from kvshard.runtime.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "greater than or equal to 1"),
        ({"n": 100_000}, "less than or equal to 16384"),
        ({"n": 2, "temperature": 0}, "n=2 with temperature=0: greedy answers would all be the same"),
        ({"presence_penalty": 2.1}, "less than or equal to 2"),
        ({"frequency_penalty": -2.1}, "greater than or equal to -2"),
        ({"repetition_penalty": 0}, "greater than 0"),
        ({"repetition_penalty": float("inf")}, "finite"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {-1: 1}}, "greater than or equal to 0"),
        ({"logit_bias": {5: float("nan")}}, "finite"),
        ({"logit_bias": [5]}, "dictionary"),
        ({"allowed_token_ids": []}, "at least 1 item"),
        ({"allowed_token_ids": [-1]}, "greater than or equal to 0"),
        ({"bad_words": "word"}, "tuple"),
        ({"bad_words": ["a", " "]}, "a bad word must not be empty"),
        ({"bad_words": ["\ud800"]}, "half of a surrogate pair"),
        ({"stop": "x", "detokenize": False}, "stop strings are looked for in the text"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SamplingParams(**fields)


def test_bias_has_ids_for_keys_and_stays_within_vllms_limits() -> None:
    params = SamplingParams(logit_bias={"7": -200, 8: 3, "9": 100.5})  # type: ignore[dict-item]
    assert params.logit_bias == {7: -100.0, 8: 3.0, 9: 100.0}
    assert SamplingParams.model_validate(params.model_dump(mode="json")) == params
    assert SamplingParams.model_validate(params.model_dump(), strict=True) == params


def test_null_is_the_default() -> None:
    names = ("logit_bias", "allowed_token_ids", "bad_words")
    assert SamplingParams(**dict.fromkeys(names)) == SamplingParams()


@pytest.mark.parametrize(
    ("fields", "penalizes"),
    [
        ({}, False),
        ({"logit_bias": {1: 2.0}}, False),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"repetition_penalty": 0.9}, True),
    ],
)
def test_penalizes(fields: dict[str, Any], penalizes: bool) -> None:
    assert SamplingParams(**fields).penalizes == penalizes


@pytest.mark.parametrize(
    "name", ["n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"]
)
@pytest.mark.parametrize("value", [True, False])
def test_a_truth_value_is_no_number(name: str, value: bool) -> None:
    with pytest.raises(ValidationError, match=f"expected a whole number, not {str(value).lower()}"):
        SamplingParams.model_validate({name: value})

"""What rows come to on the shards of fake_shards.py, by definition: without slots, blocks or a cache."""

import zlib
from collections.abc import Iterable

import numpy as np

from kvshard.runtime.coordinator.request import Request
from kvshard.runtime.coordinator.scoring import prompt_places

VOCAB = 97
Windows = tuple[int | None, ...]  # of the layer groups


def next_token(sequence: list[int], seed: int, suppressed: Iterable[int] = ()) -> tuple[int, float]:
    """The token after `sequence` and its "log probability": any change of any token changes them."""
    key = np.array([seed % 2**31, *sequence], np.int64).tobytes()
    for attempt in range(1000):
        digest = zlib.crc32(key, attempt)
        if digest % VOCAB not in suppressed:
            return digest % VOCAB, -float(digest % 1000) / 100
    raise AssertionError("every token is suppressed")


def noise_key(seed: int, sample_index: int) -> int:
    """Another one for each sample of a prompt; the seed for the first."""
    return seed + 1000003 * sample_index


def token_logprob(sequence: list[int], token_id: int, seed: int) -> float:
    """The "log probability" of `token_id` after `sequence`."""
    return -float(zlib.crc32(np.array([token_id, *sequence], np.int64).tobytes(), seed % 2**31) % 1000) / 100


def seen(sequence: list[int], windows: Windows) -> list[int]:
    """What the layer groups see of a sequence, one after the other."""
    return [token for window in windows for token in sequence[0 if window is None else -window :]]


def expected_prompt(request: Request, windows: Windows = (None,)) -> list[tuple[int, float, int]]:
    """(token, log probability, rank) of each prompt token but the first."""
    prompt, seed = request.prompt_token_ids, request.seed
    return [
        (prompt[at], token_logprob(seen(prompt[:at], windows), prompt[at], seed), 1)
        for at in range(1, len(prompt))
    ]


def expected(
    request: Request, eos: tuple[int, ...], max_model_len: int, windows: Windows = (None,)
) -> tuple[list[int], str]:
    """(output tokens, finish reason) by definition, one token at a time; stop strings are left out."""
    if request.task == "score":
        return [], "length"
    sampling = request.sampling
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(eos))
    room = max_model_len - len(request.prompt_token_ids)
    most = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
    output: list[int] = []
    while True:
        suppressed = ends if len(output) < sampling.min_tokens else ()
        sequence = seen(request.prompt_token_ids + output, windows)
        key = noise_key(request.seed, request.sample_index)
        output.append(next_token(sequence, key, suppressed)[0])
        if output[-1] in ends and len(output) > sampling.min_tokens:
            return output, "stop"
        if len(output) == most:
            return output, "length"


def assert_prompt_as_expected(request: Request, windows: Windows = (None,)) -> None:
    """Every prompt token was told about once, or the first ones of a request that did not end well."""
    places = prompt_places(request)
    if places is None:
        assert not request.prompt_logprobs
        return
    got = [token for place in places[1:] for token in place or ()]
    whole = expected_prompt(request, windows)
    assert len(got) == len(whole) or request.finish_reason in ("abort", "error")
    for token, wanted in zip(got, whole, strict=False):
        assert (token.token_id, token.rank) == (wanted[0], wanted[2])
        assert abs(token.logprob - wanted[1]) < 1e-5 or request.finish_reason == "error"

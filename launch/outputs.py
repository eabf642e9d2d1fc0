"""What the Python API returns: shaped like vLLM's outputs."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from ..runtime.coordinator.logprobs import Place
from ..runtime.coordinator.request import Request
from ..runtime.coordinator.samples import Samples
from ..runtime.coordinator.scoring import prompt_places, score_of
from ..runtime.models.prompt import Prompt


@dataclass(frozen=True)
class Logprob:
    """One token at one place, under the model's raw logits."""

    logprob: float
    rank: int  # 1 + the number of tokens with a greater logit
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One answer."""

    index: int
    text: str
    token_ids: list[int]  # an ending EOS or stop token included
    cumulative_logprob: float | None  # None unless SamplingParams.logprobs is set, as `logprobs`
    logprobs: (
        list[dict[int, Logprob]] | None
    )  # by place: the chosen token's, then the most likely ones', by token id
    finish_reason: str | None  # stop, length, abort, or error (then RequestOutput.error says why)
    stop_reason: int | str | None  # the stop string or stop token that ended it; None for EOS


@dataclass(frozen=True)
class RequestMetrics:
    """Where a prompt's time went; times are readings of one clock, in seconds.

    With n above 1: the first of its samples to be admitted and to have a token, the last to end, the mean of their
    tpot_ms and all their preemptions.
    """

    arrived_s: float | None
    admitted_s: float | None
    first_token_s: float | None
    finished_s: float | None
    ttft_ms: float | None
    tpot_ms: float | None
    num_preemptions: int


@dataclass(frozen=True)
class RequestOutput:
    """One prompt with its answers."""

    request_id: str
    prompt_index: int  # its place among the prompts of the call
    prompt: str | None  # None for token ids and chats
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None  # like an answer's; None for the first token
    outputs: list[CompletionOutput]  # SamplingParams.n, in the order of their index
    finished: bool
    error: str | None  # why the model gave no answer (for n above 1: not all), as when logits are not finite
    metrics: RequestMetrics


@dataclass(frozen=True)
class ScoreOutput:
    """One text with its score; the first token of a text has no probability and counts for nothing."""

    request_id: str
    prompt: str | None  # None for token ids
    prompt_token_ids: list[int]
    prompt_logprobs: list[
        dict[int, Logprob] | None
    ]  # None for the first token; cut short where there is no score
    logprob_sum: float | None  # None after an abort or an error
    perplexity: (
        float | None
    )  # exp(-logprob_sum / number of scored tokens); None also when no float can hold it
    error: str | None  # why there is no score, as when the model's logits were not finite


def score_output(request: Request, prompt: Prompt, text_of: Callable[[int], str]) -> ScoreOutput:
    """What `score` returns for a finished request; `text_of` gives the text of a token."""
    score = score_of(request)
    return ScoreOutput(
        request_id=request.request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=request.prompt_token_ids,
        prompt_logprobs=_prompt_logprobs(request, text_of) or [],
        logprob_sum=None if score is None else score.logprob_sum,
        perplexity=None if score is None else score.perplexity,
        error=request.error,
    )


def request_output(
    samples: Samples, prompt: Prompt, prompt_index: int, text_of: Callable[[int], str]
) -> RequestOutput:
    """What `generate` returns for a prompt that has ended; `text_of` gives the text of a token."""
    first = samples.requests[0]
    return RequestOutput(
        request_id=samples.request_id,
        prompt_index=prompt_index,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=first.prompt_token_ids,
        prompt_logprobs=_prompt_logprobs(first, text_of),
        outputs=[_answer(request, text_of) for request in samples.requests],
        finished=True,
        error=samples.error,
        metrics=_metrics(samples.requests),
    )


def _answer(request: Request, text_of: Callable[[int], str]) -> CompletionOutput:
    places = None if request.output_logprobs is None else list(request.output_logprobs.places())
    return CompletionOutput(
        index=request.sample_index,
        text=request.text,
        token_ids=request.output_token_ids,
        cumulative_logprob=None if places is None else sum(place[0].logprob for place in places),
        logprobs=None if places is None else [_by_id(place, text_of) for place in places],
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
    )


def _metrics(requests: list[Request]) -> RequestMetrics:
    admitted = [request.admitted_s for request in requests if request.admitted_s is not None]
    first_tokens = [request.first_token_s for request in requests if request.first_token_s is not None]
    finished = [request.finished_s for request in requests if request.finished_s is not None]
    tpots_ms = [request.tpot_ms for request in requests if request.tpot_ms is not None]
    return RequestMetrics(
        arrived_s=requests[0].arrived_s,
        admitted_s=min(admitted, default=None),
        first_token_s=min(first_tokens, default=None),
        finished_s=max(finished, default=None),
        ttft_ms=(min(first_tokens) - min(admitted)) * 1e3 if first_tokens else None,
        tpot_ms=statistics.fmean(tpots_ms) if tpots_ms else None,
        num_preemptions=sum(request.num_preemptions for request in requests),
    )


def _prompt_logprobs(
    request: Request, text_of: Callable[[int], str]
) -> list[dict[int, Logprob] | None] | None:
    places = prompt_places(request)
    if places is None:
        return None
    return [None if place is None else _by_id(place, text_of) for place in places]


def _by_id(place: Place, text_of: Callable[[int], str]) -> dict[int, Logprob]:
    return {token.token_id: Logprob(token.logprob, token.rank, text_of(token.token_id)) for token in place}

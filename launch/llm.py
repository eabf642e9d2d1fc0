"""The Python API: `LLM(...).generate(prompts, sampling_params)`, with outputs shaped like vLLM's."""

import statistics
import threading
import weakref
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, overload

from ..runtime.config import parse_config
from ..runtime.coordinator.request import Request
from ..runtime.coordinator.samples import Samples
from ..runtime.errors import ConfigError, RequestError
from ..runtime.models.prompt import Prompt
from ..runtime.sampling_params import SamplingParams
from .running import Running

PromptInput = str | Mapping[str, Any]
"""Text, {"prompt": text} or {"prompt_token_ids": ids}."""
Message = Mapping[str, Any]
"""One chat message: {"role": ..., "content": ...}."""


@dataclass(frozen=True)
class Logprob:
    """The log probability of one token under the model's raw logits."""

    logprob: float
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One answer."""

    index: int
    text: str
    token_ids: list[int]  # an ending EOS or stop token included
    cumulative_logprob: float | None  # None unless SamplingParams.logprobs is set, as `logprobs`
    logprobs: list[dict[int, Logprob]] | None  # one entry a token: the chosen one's
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
    outputs: list[CompletionOutput]  # SamplingParams.n, in the order of their index
    finished: bool
    error: str | None  # why the model gave no answer (for n above 1: not all), as when logits are not finite
    metrics: RequestMetrics


class LLM:
    """A model whose shards run until `close()`; use as a context manager.

    Every setting of a job file is a keyword, groups as dicts: `LLM(model="demo", tensor_parallel_size=2,
    cache={"num_blocks": 64})`. `sampling` holds the defaults for calls without sampling_params. Raises
    ConfigError for settings that cannot work and ShardError when shards do not start.
    """

    def __init__(self, model: str | Path, *, tensor_parallel_size: int = 1, **settings: Any) -> None:
        for key in ("input", "output"):
            if settings.get(key) is not None:
                raise ConfigError(f"LLM: {key} belongs to a job file; pass prompts to generate() instead")
        if settings.get("launcher") == "torchrun":
            raise ConfigError("LLM: launcher=torchrun only runs job files; use local or ray")
        values = {"model": str(model), "tensor_parallel_size": tensor_parallel_size, **settings}
        config = parse_config(values, "LLM")
        from .engine import Engine  # late: torch and transformers take seconds to import

        self._engine = Engine.start(config)
        # Also closes the shards of an LLM that is dropped, or still open when Python exits.
        self._close = weakref.finalize(self, self._engine.close)
        self._running = Running(self._engine.coordinator, self._close)
        self._next_id = 0
        self._naming = threading.Lock()  # around _next_id

    @overload
    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = ...,
        *,
        progress: bool = ...,
        stream: Literal[False] = ...,
    ) -> list[RequestOutput]: ...
    @overload
    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = ...,
        *,
        progress: bool = ...,
        stream: Literal[True],
    ) -> Generator[RequestOutput, None, None]: ...
    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        stream: bool = False,
    ) -> list[RequestOutput] | Generator[RequestOutput, None, None]:
        """Answer every prompt, in the order of `prompts`; with `stream`, one by one in the order in which they end.

        A prompt is text, {"prompt": text} or {"prompt_token_ids": ids}; `sampling_params` is one for all or
        one for each. Requests are named "0", "1", ... over the life of this object. Raises RequestError for
        a prompt that cannot run, before any runs, and ShardError, which also closes this object. Ctrl-C ends the call
        after the current step; a second one does not wait for it, and closes this object.

        A stream runs while its next output is waited for, and starts with the first. Leaving its loop, or closing it,
        aborts the prompts that are left. Other calls may be made while it is open, and run beside it.
        """
        many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        results = self._results([_read_prompt(prompt) for prompt in many], sampling_params, progress)
        return results if stream else _in_order(results)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or several, as `generate` does."""
        one = len(messages) > 0 and isinstance(messages[0], Mapping)
        chats: Sequence[Any] = [messages] if one else messages
        prompts: list[Prompt] = [[dict(message) for message in chat] for chat in chats]
        return _in_order(self._results(prompts, sampling_params, progress))

    def abort(self, request_id: str) -> None:
        """End a request of a stream, or of a call in another thread, with all its samples; its blocks are freed.

        It comes back with finish_reason "abort" and the tokens it had. Unknown ids are ignored, since a request may
        finish at any time.
        """
        self._running.abort(request_id)

    def close(self) -> None:
        """Stop the shards; safe to call twice."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _results(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
    ) -> Generator[RequestOutput, None, None]:
        """The outputs as they come. All prompts are checked here, before the first is asked for."""
        if not self._close.alive:
            raise ConfigError("this LLM is closed; make another one")
        params = _one_each(sampling_params, len(prompts), self._engine.config.sampling)
        all_samples = self._make_samples(prompts, params)
        indices = {samples.request_id: index for index, samples in enumerate(all_samples)}

        def outputs() -> Generator[RequestOutput, None, None]:
            with closing(self._running.results(all_samples, progress)) as results:
                for samples in results:
                    index = indices[samples.request_id]
                    yield self._output(samples, prompts[index], index)

        return outputs()

    def _make_samples(self, prompts: list[Prompt], params: list[SamplingParams]) -> list[Samples]:
        all_samples = []
        with self._naming:
            for index, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
                try:
                    request = self._engine.make_request(str(self._next_id + index), prompt, sampling)
                    self._engine.coordinator.check(request)
                except RequestError as error:
                    raise RequestError(f"prompts[{index}]: {error}") from None
                all_samples.append(Samples(request))
            self._next_id += len(all_samples)
        return all_samples

    def _output(self, samples: Samples, prompt: Prompt, index: int) -> RequestOutput:
        return RequestOutput(
            request_id=samples.request_id,
            prompt_index=index,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=samples.requests[0].prompt_token_ids,
            outputs=[self._answer(request) for request in samples.requests],
            finished=True,
            error=samples.error,
            metrics=_metrics(samples.requests),
        )

    def _answer(self, request: Request) -> CompletionOutput:
        logprobs = None
        if request.output_logprobs is not None:
            decode = self._engine.tokenizer.decode
            logprobs = [
                {token_id: Logprob(logprob, decode([token_id]))}
                for token_id, logprob in zip(request.output_token_ids, request.output_logprobs, strict=True)
            ]
        return CompletionOutput(
            index=request.sample_index,
            text=request.text,
            token_ids=request.output_token_ids,
            cumulative_logprob=None if request.output_logprobs is None else sum(request.output_logprobs),
            logprobs=logprobs,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )


def _in_order(outputs: Iterable[RequestOutput]) -> list[RequestOutput]:
    return sorted(outputs, key=lambda output: output.prompt_index)


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


def _read_prompt(prompt: PromptInput) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping) and len(prompt) == 1:
        if isinstance(text := prompt.get("prompt"), str):
            return text
        if isinstance(ids := prompt.get("prompt_token_ids"), Sequence) and not isinstance(ids, str):
            return [int(token_id) for token_id in ids]
    raise RequestError(f'a prompt is text, {{"prompt": text}} or {{"prompt_token_ids": ids}}, not {prompt!r}')


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int, default: SamplingParams
) -> list[SamplingParams]:
    if params is None:
        return [default] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError(
            f"{count} prompts and {len(params)} sampling_params; give one, or one for each prompt"
        )
    return list(params)

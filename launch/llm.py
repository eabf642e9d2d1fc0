"""The Python API: `LLM(...).generate(prompts, sampling_params)`, with outputs shaped like vLLM's."""

import threading
import weakref
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Self, overload

from ..runtime.config import Task, parse_config
from ..runtime.coordinator.detokenizer import TokenTexts
from ..runtime.coordinator.samples import Samples
from ..runtime.errors import ConfigError, RequestError
from ..runtime.models.prompt import Prompt
from ..runtime.sampling_params import SamplingParams
from .outputs import RequestOutput, ScoreOutput, request_output, score_output
from .running import Running

PromptInput = str | Mapping[str, Any]
"""Text, {"prompt": text} or {"prompt_token_ids": ids}."""
Message = Mapping[str, Any]
"""One chat message: {"role": ..., "content": ...}."""


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
        if settings.get("task") is not None:
            raise ConfigError("LLM: task belongs to a job file; call generate(), chat() or score() instead")
        if settings.get("launcher") == "torchrun":
            raise ConfigError("LLM: launcher=torchrun only runs job files; use local or ray")
        values = {"model": str(model), "tensor_parallel_size": tensor_parallel_size, **settings}
        config = parse_config(values, "LLM")
        from .engine import Engine  # late: torch and transformers take seconds to import

        self._engine = Engine.start(config)
        self._running = Running(self._engine.coordinator, self._engine.close)
        # Also closes the shards of an LLM that is dropped, or still open when Python exits.
        weakref.finalize(self, self._running.close)
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
        outputs = self._outputs([_read_prompt(prompt) for prompt in many], sampling_params, progress)
        return outputs if stream else _in_order(outputs)

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
        return _in_order(self._outputs(prompts, sampling_params, progress))

    def score(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        prompt_logprobs: int = 0,
        *,
        progress: bool = False,
    ) -> list[ScoreOutput]:
        """How likely each text is, in the order of `prompts`, given as to `generate`; nothing is generated.

        `prompt_logprobs` is how many of the most likely tokens come with each one of the text. Raises what `generate`
        raises.
        """
        many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        texts = [_read_prompt(prompt) for prompt in many]
        params = SamplingParams(prompt_logprobs=prompt_logprobs)
        ended = dict(self._results(texts, params, progress, "score"))
        text_of = TokenTexts(self._engine.tokenizer.decode)
        return [score_output(ended[i].requests[0], text, text_of) for i, text in enumerate(texts)]

    def abort(self, request_id: str) -> None:
        """End a request of a stream, or of a call in another thread, with all its samples; its blocks are freed.

        It comes back with finish_reason "abort" and the tokens it had. Unknown ids are ignored, since a request may
        finish at any time.
        """
        self._running.abort(request_id)

    def close(self) -> None:
        """Stop the shards, after the step of a call in another thread, which ends with ConfigError; safe to call twice."""
        self._running.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _outputs(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
    ) -> Generator[RequestOutput, None, None]:
        """The outputs as they come. All prompts are checked here, before the first is asked for."""
        results = self._results(prompts, sampling_params, progress, "generate")
        text_of = TokenTexts(self._engine.tokenizer.decode)

        def outputs() -> Generator[RequestOutput, None, None]:
            with closing(results):
                for index, samples in results:
                    yield request_output(samples, prompts[index], index, text_of)

        return outputs()

    def _results(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
        task: Task,
    ) -> Generator[tuple[int, Samples], None, None]:
        """What has ended, with its place among `prompts`; all are checked here."""
        if self._running.is_closed:
            raise ConfigError("this LLM is closed; make another one")
        params = _one_each(sampling_params, len(prompts), self._engine.config.sampling)
        all_samples = self._make_samples(prompts, params, task)
        indices = {samples.request_id: index for index, samples in enumerate(all_samples)}

        def results() -> Generator[tuple[int, Samples], None, None]:
            with closing(self._running.results(all_samples, progress)) as ended:
                for samples in ended:
                    yield indices[samples.request_id], samples

        return results()

    def _make_samples(self, prompts: list[Prompt], params: list[SamplingParams], task: Task) -> list[Samples]:
        all_samples = []
        with self._naming:
            for index, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
                try:
                    request = self._engine.make_request(str(self._next_id + index), prompt, sampling, task)
                    self._engine.coordinator.check(request)
                except RequestError as error:
                    raise RequestError(f"prompts[{index}]: {error}") from None
                all_samples.append(Samples(request))
            self._next_id += len(all_samples)
        return all_samples


def _in_order(outputs: Iterable[RequestOutput]) -> list[RequestOutput]:
    return sorted(outputs, key=lambda output: output.prompt_index)


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

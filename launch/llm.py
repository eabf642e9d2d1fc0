"""The Python API: `LLM(...).generate(prompts, sampling_params)`, with outputs shaped like vLLM's."""

import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

from rich.console import Console

from ..runtime.config import Task, parse_config
from ..runtime.coordinator.detokenizer import TokenTexts
from ..runtime.coordinator.request import Request
from ..runtime.errors import ConfigError, RequestError
from ..runtime.models.prompt import Prompt
from ..runtime.observe.progress import NoProgress, make_progress
from ..runtime.sampling_params import SamplingParams
from .outputs import RequestOutput, ScoreOutput, request_output, score_output

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
        # Also closes the shards of an LLM that is dropped, or still open when Python exits.
        self._close = weakref.finalize(self, self._engine.close)
        self._next_id = 0
        self._lock = threading.Lock()
        self._live: dict[str, Request] = {}
        self._aborts: deque[str] = deque()

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer every prompt, in the order of `prompts`.

        A prompt is text, {"prompt": text} or {"prompt_token_ids": ids}; `sampling_params` is one for all or
        one for each. Requests are named "0", "1", ... over the life of this object. Raises RequestError for
        a prompt that cannot run, before any runs, and ShardError, which also closes this object. Ctrl-C ends the call
        after the current step; a second one does not wait for it, and closes this object.
        """
        many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        return self._run([_read_prompt(prompt) for prompt in many], sampling_params, progress)

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
        return self._run([[dict(message) for message in chat] for chat in chats], sampling_params, progress)

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
        requests = self._answer(texts, SamplingParams(prompt_logprobs=prompt_logprobs), progress, "score")
        text_of = TokenTexts(self._engine.tokenizer.decode)
        return [score_output(request, text, text_of) for request, text in zip(requests, texts, strict=True)]

    def abort(self, request_id: str) -> None:
        """End a request of the `generate`, `chat` or `score` that runs in another thread; its blocks are freed.

        It comes back with finish_reason "abort" and the tokens it had. Unknown ids are ignored, since a request may
        finish at any time.
        """
        if request_id in self._live:
            self._aborts.append(request_id)

    def close(self) -> None:
        """Stop the shards; safe to call twice."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
    ) -> list[RequestOutput]:
        requests = self._answer(prompts, sampling_params, progress, "generate")
        text_of = TokenTexts(self._engine.tokenizer.decode)
        return [
            request_output(request, prompt, text_of)
            for request, prompt in zip(requests, prompts, strict=True)
        ]

    def _answer(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
        task: Task,
    ) -> list[Request]:
        if not self._close.alive:
            raise ConfigError("this LLM is closed; make another one")
        params = _one_each(sampling_params, len(prompts), self._engine.config.sampling)
        with self._lock:
            try:
                requests = self._add(prompts, params, task)
                self._step_until_done(len(requests), progress)
            finally:
                for request_id in self._live:  # left by an error: the next call must not run them
                    self._engine.coordinator.abort(request_id)
                self._live.clear()
                self._aborts.clear()
        return requests

    def _add(self, prompts: list[Prompt], params: list[SamplingParams], task: Task) -> list[Request]:
        requests = []
        for index, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
            try:
                request = self._engine.make_request(str(self._next_id + index), prompt, sampling, task)
                self._engine.coordinator.check(request)
            except RequestError as error:
                raise RequestError(f"prompts[{index}]: {error}") from None
            requests.append(request)
        self._next_id += len(requests)
        for request in requests:
            self._engine.coordinator.add(request)
            self._live[request.request_id] = request
        return requests

    def _step_until_done(self, total: int, progress: bool) -> None:
        coordinator = self._engine.coordinator
        view = make_progress(Console(stderr=True)) if progress else NoProgress()
        view.start(total)
        num_tokens = 0
        try:
            with _interrupts_held() as let_interrupt:
                # After an abort until its last plan is back, which frees its blocks.
                while coordinator.has_work:
                    let_interrupt()
                    ended = self._step()
                    while self._aborts:
                        if (aborted := coordinator.abort(self._aborts.popleft())) is not None:
                            ended.append(aborted)
                    for request in ended:
                        del self._live[request.request_id]
                        num_tokens += request.num_made
                    view.update(total - len(self._live), 0, num_tokens)
        finally:
            view.stop()

    def _step(self) -> list[Request]:
        try:
            return self._engine.coordinator.step()
        except BaseException:
            self._close()  # a step that was broken off cannot be taken up again
            raise


@contextmanager
def _interrupts_held() -> Iterator[Callable[[], None]]:
    """Inside, Ctrl-C only takes effect when the function that this gives is called; a second one does at once."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield lambda: None  # it reaches only the main thread, or nobody
        return
    held: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append((number, frame))
        if len(held) > 1:
            previous(number, frame)

    def let_interrupt() -> None:
        if held:
            previous(*held.pop())

    signal.signal(signal.SIGINT, hold)
    try:
        yield let_interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
    let_interrupt()


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

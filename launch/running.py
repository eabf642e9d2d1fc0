"""The prompts of one LLM that have not ended. Calls that wait for theirs take the steps, from any thread."""

import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from ..runtime.coordinator.loop import Coordinator
from ..runtime.coordinator.request import Request
from ..runtime.coordinator.samples import Samples
from ..runtime.errors import ConfigError, ShardError
from ..runtime.observe.progress import NoProgress, make_progress


class Running:
    """Drives a coordinator for any number of calls, one step at a time; a step serves the prompts of all of them.

    `close_shards` ends them for good; it is also called when a step is broken off, which cannot be taken up again.
    """

    def __init__(self, coordinator: Coordinator, close_shards: Callable[[], None]) -> None:
        self.is_closed = False
        self._coordinator = coordinator  # touched by the thread whose turn it is
        self._close_shards = close_shards
        self._turn = threading.Condition()  # around _stepper and is_closed; told of every end of a step
        self._stepper: int | None = None  # the thread that takes a step
        self._live: dict[str, tuple[Samples, deque[Samples]]] = {}  # by request id; where it goes at its end
        self._new: deque[Request] = deque()  # not with the coordinator yet
        self._aborts: deque[str] = deque()
        self._failure: BaseException | None = None  # what broke a step off

    def abort(self, request_id: str) -> None:
        """End a prompt before the next step; unknown ids are ignored."""
        if request_id in self._live:
            self._aborts.append(request_id)

    def close(self) -> None:
        """End the shards, after the step that another thread takes; safe to call twice. Calls that are open then raise."""
        with self._turn:
            is_first, self.is_closed = not self.is_closed, True  # no other step begins
            # A step is not waited for by what interrupts it: a signal handler, or its own failure.
            self._turn.wait_for(lambda: self._stepper in (None, threading.get_ident()))
            if is_first:
                self._close_shards()

    def results(self, prompts: list[Samples], progress: bool) -> Generator[Samples, None, None]:
        """Run these prompts; each when all its samples have ended, in that order.

        Nothing is begun before the first is asked for. Closing it aborts those that are left. Raises ConfigError
        when the shards have been closed, and ShardError.
        """
        ended: deque[Samples] = deque()
        num_ended = num_tokens = 0
        view = make_progress(Console(stderr=True)) if progress else NoProgress()
        view.start(len(prompts))
        try:
            for samples in prompts:
                self._live[samples.request_id] = samples, ended
                self._new += samples.requests
            while num_ended < len(prompts):
                self._advance(ended)
                while ended:
                    samples = ended.popleft()
                    num_ended += 1
                    num_tokens += samples.num_made
                    view.update(num_ended, 0, num_tokens)
                    yield samples
            while not self._live and self._coordinator.has_work and not self.is_closed:
                self._advance(ended)  # what the last plans hold is given back with their results
        finally:
            view.stop()
            self._aborts += [samples.request_id for samples in prompts]
            with self._turn:
                # Not waited for: this may be a garbage collection in the middle of a step. The next one does it.
                if self._stepper is None:
                    self._add_and_abort()

    def _advance(self, ended: deque[Samples]) -> None:
        """Take a step, unless another thread does so: then wait for the end of that one, or for what it ends."""
        with self._turn:
            self._turn.wait_for(lambda: ended or self._stepper is None)
        with _interrupts_held():
            with self._turn:
                if ended or self._stepper is not None:
                    return
                self._stepper = threading.get_ident()
            try:
                self._step()
            finally:
                with self._turn:
                    self._stepper = None
                    self._turn.notify_all()

    def _step(self) -> None:
        if self.is_closed:
            if not self._live:
                return  # closed since the last answer ended: nobody waits for more
            if isinstance(self._failure, ShardError):
                raise self._failure  # it ends the calls of all threads
            raise ConfigError("this LLM is closed; make another one") from self._failure
        try:
            self._add_and_abort()
            for request in self._coordinator.step():
                self._end(request)
        except BaseException as failure:
            self._failure = failure
            self.close()
            raise

    def _add_and_abort(self) -> None:
        while self._new:
            self._coordinator.add(self._new.popleft())
        while self._aborts:
            request_id = self._aborts.popleft()
            if request_id in self._live:
                for request in self._live[request_id][0].requests:
                    if self._coordinator.abort(request_id, request.sample_index) is not None:
                        self._end(request)

    def _end(self, request: Request) -> None:
        samples, ended = self._live[request.request_id]
        if samples.end_one():
            del self._live[request.request_id]
            ended.append(samples)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Inside, Ctrl-C takes effect at the end only; a second one does at once."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield  # it reaches only the main thread, or nobody
        return
    held: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append((number, frame))
        if len(held) > 1:
            previous(number, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if held:
        previous(*held[0])

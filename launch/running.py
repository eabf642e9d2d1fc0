"""The prompts of one LLM that have not ended: whoever waits for one takes the steps, from any thread."""

import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from weakref import finalize

from rich.console import Console

from ..runtime.coordinator.loop import Coordinator
from ..runtime.coordinator.request import Request
from ..runtime.coordinator.samples import Samples
from ..runtime.errors import ConfigError
from ..runtime.observe.progress import NoProgress, make_progress


class Running:
    """Drives a coordinator for any number of calls; a step serves the prompts of all that are under way.

    `close` ends the shards for good; it is called when a step is broken off, which cannot be taken up again.
    """

    def __init__(self, coordinator: Coordinator, close: finalize) -> None:  # type: ignore[type-arg]
        self._coordinator = coordinator
        self._close = close
        self._lock = threading.Lock()  # around all uses of the coordinator
        self._live: dict[str, tuple[Samples, deque[Samples]]] = {}  # by request id; where it goes at its end
        self._aborts: deque[str] = deque()

    def abort(self, request_id: str) -> None:
        """End a prompt before the next step; unknown ids are ignored."""
        if request_id in self._live:
            self._aborts.append(request_id)

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
            with self._lock, _interrupts_held():
                for samples in prompts:
                    self._live[samples.request_id] = samples, ended
                    for request in samples.requests:
                        self._coordinator.add(request)
            while num_ended < len(prompts):
                with self._lock, _interrupts_held():
                    self._step()
                while ended:
                    samples = ended.popleft()
                    num_ended += 1
                    num_tokens += samples.num_output_tokens
                    view.update(num_ended, 0, num_tokens)
                    yield samples
            with self._lock, _interrupts_held():
                while not self._live and self._coordinator.has_work:
                    self._step()  # what the last plans hold is given back with their results
        finally:
            view.stop()
            self._aborts += [samples.request_id for samples in prompts if samples.request_id in self._live]
            # Not waited for: this may be a garbage collection in the middle of a step. That thread's next one does it.
            if self._lock.acquire(blocking=False):
                try:
                    self._abort_some()
                finally:
                    self._lock.release()

    def _step(self) -> None:
        if not self._close.alive:
            raise ConfigError("this LLM is closed; make another one")
        self._abort_some()
        try:
            requests = self._coordinator.step()
        except BaseException:
            self._close()
            raise
        for request in requests:
            self._end(request)

    def _abort_some(self) -> None:
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

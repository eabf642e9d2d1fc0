"""One batch job: rows in, answers out, with the coordinator never waiting for either."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from ..config import JobConfig, Task
from ..coordinator.detokenizer import TokenTexts
from ..coordinator.executor import ShardHealth, ShardInfo
from ..coordinator.request import Request
from ..coordinator.samples import Samples
from ..coordinator.stats import CoordinatorStats
from ..errors import RequestError
from ..models.prompt import Prompt
from ..observe.progress import ProgressView
from ..observe.summary import BatchSummary
from ..sampling_params import SamplingParams
from .output import OutputFile
from .records import BadRow, Row
from .response import answer_line, error_line

POLL_S = 0.1
JOIN_S = 5.0


class BatchCoordinator(Protocol):
    """The part of a coordinator that a batch job uses."""

    def add(self, request: Request) -> None: ...
    def step(self) -> list[Request]: ...
    @property
    def has_work(self) -> bool: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def stats(self) -> CoordinatorStats: ...


class BatchExecutor(Protocol):
    """The part of an executor that a batch job uses."""

    def health(self) -> Sequence[ShardHealth]: ...


class TokenDecoder(Protocol):
    """The part of a tokenizer that log probabilities need."""

    def decode(self, token_ids: list[int]) -> str: ...


class BatchEngine(Protocol):
    """A started model."""

    @property
    def config(self) -> JobConfig: ...
    @property
    def coordinator(self) -> BatchCoordinator: ...
    @property
    def executor(self) -> BatchExecutor: ...
    @property
    def shards(self) -> Sequence[ShardInfo]: ...
    @property
    def tokenizer(self) -> TokenDecoder: ...
    def make_request(
        self, request_id: str, prompt: Prompt, sampling: SamplingParams, task: Task
    ) -> Request: ...


def run_batch(
    engine: BatchEngine,
    rows: Iterator[Row | BadRow],
    output: OutputFile,
    progress: ProgressView,
    stop: threading.Event,
) -> BatchSummary:
    """Run every row that `output` does not have, and write each as it finishes.

    Setting `stop` ends the job after the current step; what was not written runs again next time. Raises
    ConfigError (input or output file) and ShardError; the rows written so far stay.
    """
    config = engine.config
    summary = BatchSummary(output.path, config.task)
    waiting_target = config.scheduler.max_num_seqs
    running: dict[str, tuple[Row, Samples]] = {}
    coordinator = engine.coordinator
    text_of = TokenTexts(engine.tokenizer.decode)
    started_s = shown_s = time.monotonic()

    def make_request(row: Row) -> Request:
        return engine.make_request(row.row_id, row.prompt, row.sampling, config.task)

    def fail(failure: "_Failure") -> None:
        output.write(error_line(failure.row_id, "input_error", failure.code, failure.message))
        summary.num_failed += 1

    def admit(item: "_Item") -> None:
        if isinstance(item, _Failure):
            return fail(item)
        row, request = item
        samples = Samples(request)
        try:
            for request in samples.requests:  # alike: what can never run fails with the first
                coordinator.add(request)
        except RequestError as error:
            return fail(_Failure(row.row_id, "invalid_request", str(error)))
        running[row.row_id] = row, samples

    def finish(request: Request) -> None:
        row, samples = running[request.request_id]
        if not samples.end_one():
            return
        del running[request.request_id]
        if samples.error is not None:
            output.write(error_line(row.row_id, "system_error", "request_failed", samples.error))
            summary.num_failed += 1
        else:
            output.write(answer_line(row, samples.requests, config.model, text_of))
            summary.add(samples.requests)

    def show() -> None:
        num_tokens = summary.num_tokens + sum(samples.num_made for _, samples in running.values())
        progress.update(summary.num_ok + summary.num_failed, summary.num_failed, num_tokens)

    with _Feeder(rows, output.done, make_request, 2 * waiting_target) as feeder:
        while not stop.is_set():
            while coordinator.num_waiting < waiting_target and (item := feeder.get(0.0)) is not None:
                admit(item)
            if coordinator.has_work:
                for request in coordinator.step():
                    finish(request)
            elif feeder.exhausted:
                break
            elif (item := feeder.get(POLL_S)) is not None:
                admit(item)
            if time.monotonic() - shown_s >= POLL_S:
                shown_s = time.monotonic()
                show()
        else:
            summary.interrupted = True
        summary.num_skipped = feeder.num_skipped
    show()
    summary.wall_s = time.monotonic() - started_s
    summary.add_engine(engine.shards, engine.executor.health(), coordinator.stats)
    return summary


@dataclass(frozen=True)
class _Failure:
    """A row that cannot run."""

    row_id: str
    code: str
    message: str


_Item = tuple[Row, Request] | _Failure


class _Feeder:
    """Reads and tokenises rows in a thread of its own, up to `max_ahead` rows before they are asked for."""

    def __init__(
        self,
        rows: Iterator[Row | BadRow],
        done: set[str],
        make_request: Callable[[Row], Request],
        max_ahead: int,
    ) -> None:
        self.num_skipped = 0
        self._rows = rows
        self._done = done
        self._make_request = make_request
        self._items: queue.Queue[_Item | None] = queue.Queue(max_ahead)  # None: there are no more
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="row-feeder", daemon=True)

    @property
    def exhausted(self) -> bool:
        """True when every row was handed out. Raises what reading the rows raised."""
        # The event first: what was done before it is then seen below.
        if not self._ended.is_set() or not self._items.empty():
            return False
        if self._error is not None:
            raise self._error
        return True

    def get(self, timeout_s: float) -> _Item | None:
        """The next row, or None when none is ready in time, or there are no more."""
        try:
            return self._items.get(block=timeout_s > 0, timeout=timeout_s)
        except queue.Empty:
            return None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join(JOIN_S)  # a daemon: one that hangs in a file read cannot hold up the exit

    def _run(self) -> None:
        try:
            for row in self._rows:
                if row.row_id in self._done:
                    self.num_skipped += 1
                elif not self._put(self._prepare(row)):
                    return
        except BaseException as error:  # noqa: BLE001 - raised again by `exhausted`, in the job's thread
            self._error = error
        self._ended.set()
        self._put(None)  # wakes who waits for a row

    def _prepare(self, row: Row | BadRow) -> _Item:
        if isinstance(row, BadRow):
            return _Failure(row.row_id, row.code, row.message)
        try:
            return row, self._make_request(row)
        except RequestError as error:
            return _Failure(row.row_id, "invalid_request", str(error))

    def _put(self, item: _Item | None) -> bool:
        while not self._closing.is_set():
            try:
                self._items.put(item, timeout=POLL_S)
                return True
            except queue.Full:
                continue
        return False

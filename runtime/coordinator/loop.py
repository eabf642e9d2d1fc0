"""The coordinator: holds every request and token, decides each step, and waits for its result."""

import time
from collections.abc import Callable, Collection, Mapping

from ..errors import RequestError
from .detokenizer import TokenDecoder
from .executor import Executor
from .limits import Limits
from .request import FinishReason, Request
from .scheduler import Scheduler
from .stats import CoordinatorStats
from .stop import EndOfRequest


class Coordinator:
    """Runs requests through an executor that has been started.

    `tokenizer` turns tokens into text; without one, texts stay empty and stop strings are refused.
    `byte_tokens` are its tokens for single bytes, id to byte, if it has such.
    An executor's ShardError passes through `step`; after it this object can't go on.
    """

    def __init__(
        self,
        executor: Executor,
        limits: Limits,
        *,
        eos_token_ids: Collection[int] = (),
        tokenizer: TokenDecoder | None = None,
        byte_tokens: Mapping[int, int] | None = None,
        epoch: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.stats = CoordinatorStats()
        self._executor = executor
        self._has_tokenizer = tokenizer is not None
        self._end = EndOfRequest(eos_token_ids, tokenizer, byte_tokens or {})
        self._scheduler = Scheduler(limits, tuple(sorted(set(eos_token_ids))), self.stats, epoch)
        self._requests: dict[tuple[str, int], Request] = {}  # by id and sample index; all that have not ended
        self._num_added = 0
        self._clock = clock

    def check(self, request: Request) -> None:
        """Raises RequestError, with the numbers, when `request` can never run."""
        self.limits.max_len(request)
        if request.sampling.stop and not self._has_tokenizer:
            raise RequestError(f'request "{request.request_id}": stop strings need a tokenizer')
        if request.sampling.bad_words and not request.bad_word_ids:
            raise RequestError(f'request "{request.request_id}": bad_words need a tokenizer')
        if (request.request_id, request.sample_index) in self._requests:
            raise RequestError(f'request "{request.request_id}": another one with this id has not ended')

    def add(self, request: Request) -> None:
        """Queue a new request. Raises RequestError, like `check`, and leaves it as it was."""
        self.check(request)
        request.max_len = self.limits.max_len(request)
        request.arrival = self._num_added
        request.arrived_s = self._clock()
        self._num_added += 1
        self._end.prepare(request)
        self._requests[request.request_id, request.sample_index] = request
        self._scheduler.add(request)

    def abort(self, request_id: str, sample_index: int = 0) -> Request | None:
        """End a request now, with the tokens it has; None if it isn't here. `step` won't return it."""
        request = self._requests.get((request_id, sample_index))
        if request is not None:
            self._finish(request, "abort")
        return request

    def step(self) -> list[Request]:
        """Send plans as far ahead as allowed, wait for the oldest result; the requests it ended."""
        self._send_plans()
        if self._scheduler.num_sent == 0:
            assert not self._requests, "requests are waiting and none of them can run"
            return []
        result = self._executor.result()
        ended = []
        for request in self._scheduler.update(result, self._clock()):
            reason = "error" if request.error is not None else self._end.reached(request)
            if reason is not None:
                self._finish(request, reason)
                ended.append(request)
        return ended

    @property
    def has_work(self) -> bool:
        """True until every request has ended and every sent plan has returned."""
        return bool(self._requests) or self._scheduler.num_sent > 0

    @property
    def num_waiting(self) -> int:
        """Requests without a slot; a feeder keeps this above 0 and need not go further."""
        return len(self._requests) - self.num_running

    @property
    def num_running(self) -> int:
        return len(self._scheduler.slots.owners)

    def check_integrity(self) -> None:
        """Blocks, slots and requests agree. Raises AssertionError; for tests, as it looks at everything."""
        self._scheduler.check_integrity()

    def _send_plans(self) -> None:
        while self._scheduler.num_sent <= self.limits.run_ahead:
            plan = self._scheduler.schedule(self._clock())
            if plan is None:
                break
            self._executor.submit(plan)
        ahead = self._scheduler.num_sent - 1
        self.stats.max_plans_in_flight_ahead = max(self.stats.max_plans_in_flight_ahead, ahead)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        request.finished_s = self._clock()
        self._scheduler.finish(request)
        self._end.complete_text(request)
        self.stats.num_prompt_tokens += len(request.prompt_token_ids)
        self.stats.num_output_tokens += len(request.output_token_ids)
        del self._requests[request.request_id, request.sample_index]

"""A plan on its way: what is needed of it once its result is back."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .logprobs import LogprobTable
from .plan import NO_TOKEN, Bool, Int32, StepResult
from .request import Request
from .scoring import is_scored
from .slot_table import Int64

NOT_FINITE = (
    "the model's logits are not finite: its activations overflow in this dtype (try bfloat16 or float32), "
    "or its weights are damaged"
)

NOTHING_LEFT = f"allowed_token_ids, bad_words and min_tokens may leave no token to choose; or {NOT_FINITE}"


@dataclass(frozen=True, slots=True)
class SentPlan:
    """One entry a row of the plan, decode rows first."""

    step_id: int
    num_decodes: int
    slots: Int32
    serials: Int64  # of who held the slots when it was sent
    samples: Bool
    requests: list[Request]
    num_targets: list[int]  # one entry a chunk: prompt tokens whose log probabilities come back

    def hand_out(self, result: StepResult, now: float) -> int:
        """Give each request its token; the number of tokens dropped, as their requests have ended.

        A row that was to sample and has no token gets an error instead.
        """
        token_ids = result.token_ids.tolist()
        num_dropped = 0
        for request, token_id in zip(self.requests, token_ids, strict=True):
            if request.status == "finished":
                num_dropped += token_id != NO_TOKEN
            elif token_id != NO_TOKEN:
                request.output_token_ids.append(token_id)
        if result.logprobs is not None:
            for line, row in enumerate(np.flatnonzero(self.samples).tolist()):
                request = self.requests[row]
                lines = request.output_logprobs
                if lines is not None and request.status != "finished" and token_ids[row] != NO_TOKEN:
                    lines.append(result.logprobs, line)
        if result.prompt_logprobs is not None:
            self._hand_out_prompts(result.prompt_logprobs)
        for request in self.requests[self.num_decodes :]:
            if request.first_token_s is None and request.output_token_ids:
                request.first_token_s = now
        for row in np.flatnonzero(self.samples & (result.token_ids == NO_TOKEN)).tolist():
            request = self.requests[row]
            if request.status != "finished":
                is_masked = request.sampling.allowed_token_ids or request.bad_word_ids
                request.error = NOTHING_LEFT if is_masked else NOT_FINITE
        return num_dropped

    def _hand_out_prompts(self, table: LogprobTable) -> None:
        """Give each request what its chunk was asked for; an error instead where logits were not finite."""
        start = 0
        for request, count in self._asked():
            if request.status != "finished":
                assert request.num_prompt_top is not None, "it has asked for some"
                part = table.part(start, start + count, request.num_prompt_top)
                request.prompt_logprobs.append(part)
                if not np.isfinite(part.logprobs[:, 0]).all():
                    request.error = NOT_FINITE
            start += count

    def ended_in_prompt(self, known: list[Request]) -> list[Request]:
        """Requests beside `known` that end with what came of their chunks: texts, and errors; after `hand_out`."""
        return [
            request
            for request, _ in self._asked()
            if request.status != "finished"
            and (request.error is not None or is_scored(request))
            and request not in known
        ]

    def _asked(self) -> Iterator[tuple[Request, int]]:
        """Requests with chunks that were asked for log probabilities, and of how many tokens."""
        chunks = zip(self.requests[self.num_decodes :], self.num_targets, strict=True)
        return ((request, count) for request, count in chunks if count)

"""Log probabilities of prompts: what a chunk is asked for, and what comes of it.

Where the model has seen the tokens up to place p, its logits say how likely the token at p + 1 was. So a prompt's first
token has no log probability, and a chunk's last token needs to know what the next chunk begins with.
"""

import math
from dataclasses import dataclass

import numpy as np

from .logprobs import Place
from .plan import Int32
from .request import Request


@dataclass(frozen=True, slots=True)
class ChunkTargets:
    """Prompt tokens whose log probabilities are wanted from one chunk."""

    first: int  # place in the chunk of the token before the first one; the others follow
    token_ids: Int32
    num_top: int


def take_targets(request: Request, start: int, end: int) -> ChunkTargets | None:
    """What to ask of a chunk with the tokens from `start` up to `end`, noted as asked for; None when there is nothing.

    Each token is asked for once, whatever a preemption has computed again: plans that were sent are all answered.
    """
    if request.num_prompt_top is None:
        return None
    first = max(start, request.num_targets)
    last = min(end, len(request.prompt_token_ids) - 1)
    if first >= last:
        return None
    request.num_targets = last
    token_ids = np.array(request.prompt_token_ids[first + 1 : last + 1], np.int32)
    return ChunkTargets(first - start, token_ids, request.num_prompt_top)


def prompt_places(request: Request) -> list[Place | None] | None:
    """One entry a prompt token, None for the first, of a request that ended well; None when it asked for none."""
    if request.num_prompt_top is None:
        return None
    return [None, *(place for table in request.prompt_logprobs for place in table.places())]


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a text is, by the model's raw logits."""

    num_tokens: int  # all but the first, which has no probability
    logprob_sum: float

    @property
    def perplexity(self) -> float | None:
        """exp(-logprob_sum / num_tokens); None where that is beyond a float's range."""
        try:
            return math.exp(-self.logprob_sum / self.num_tokens)
        except OverflowError:
            return None


def is_scored(request: Request) -> bool:
    """Whether each token of a text has its log probability; False for other requests."""
    num_told = sum(len(table.ranks) for table in request.prompt_logprobs)
    return request.task == "score" and num_told == len(request.prompt_token_ids) - 1


def score_of(request: Request) -> Score | None:
    """The score of a text; None before it is known, of one that failed, and for other requests."""
    if request.error is not None or not is_scored(request):
        return None
    logprobs = (logprob for table in request.prompt_logprobs for logprob in table.logprobs[:, 0].tolist())
    return Score(len(request.prompt_token_ids) - 1, math.fsum(logprobs))

"""Log probabilities of prompts: what a chunk is asked for, and what comes of it.

Where the model has seen the tokens up to place p, its logits say how likely the token at p + 1 was. So a prompt's first
token has no log probability, and a chunk's last token needs to know what the next chunk begins with.
"""

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

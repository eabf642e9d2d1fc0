"""What a shard must know to change a request's logits before a token is chosen, and its form in a plan."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LogitsRules:
    """Sent once, with the slot. What has been written so far comes along, as a slot may open again after a preemption.

    Token ids are global and below the vocabulary size.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    allowed_token_ids: tuple[int, ...] | None = None  # None: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # no output may hold one of these sequences
    prompt_ids: tuple[int, ...] = ()  # the prompt's distinct ids, when repetition_penalty is not 1
    output_ids: tuple[int, ...] = ()  # with penalties all output, else what a bad word may go on from

    @property
    def penalizes(self) -> bool:
        """True when the counts of tokens matter."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)

    def pack(self) -> tuple[Any, ...]:
        """Values that msgpack takes."""
        return (
            self.presence_penalty,
            self.frequency_penalty,
            self.repetition_penalty,
            self.logit_bias,
            None if self.allowed_token_ids is None else _pack_ids(self.allowed_token_ids),
            self.bad_words,
            _pack_ids(self.prompt_ids),
            _pack_ids(self.output_ids),
        )

    @classmethod
    def unpack(cls, values: tuple[Any, ...]) -> "LogitsRules":
        """The inverse of `pack`; `values` hold tuples and no lists."""
        presence, frequency, repetition, bias, allowed, bad_words, prompt, output = values
        return cls(
            presence_penalty=presence,
            frequency_penalty=frequency,
            repetition_penalty=repetition,
            logit_bias=bias,
            allowed_token_ids=None if allowed is None else _unpack_ids(allowed),
            bad_words=bad_words,
            prompt_ids=_unpack_ids(prompt),
            output_ids=_unpack_ids(output),
        )


def _pack_ids(token_ids: tuple[int, ...]) -> bytes:
    return np.asarray(token_ids, np.int32).tobytes()


def _unpack_ids(buffer: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(buffer, np.int32).tolist())

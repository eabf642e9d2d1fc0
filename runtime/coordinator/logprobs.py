"""Log probabilities on their way from a step to an answer: of the token at a place, and of the most likely ones there."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class TokenLogprob(NamedTuple):
    """One token at one place of a sequence."""

    token_id: int
    logprob: float  # under the model's raw logits
    rank: int  # 1 + the number of tokens with a greater logit


Place = list[TokenLogprob]
"""The token at one place of a sequence, then the most likely ones there, the likeliest first."""


@dataclass(frozen=True)
class LogprobTable:
    """P places, one a line: in column 0 the token that is there, in the others the N most likely ones."""

    token_ids: npt.NDArray[np.int32]  # [P, 1 + N]
    logprobs: npt.NDArray[np.float32]  # [P, 1 + N]
    ranks: npt.NDArray[np.int32]  # [P, 1 + N]

    def part(self, start: int, stop: int, num_top: int) -> "LogprobTable":
        """The places from `start` up to `stop`, with at most `num_top` of the most likely tokens."""
        part = slice(start, stop), slice(1 + num_top)
        return LogprobTable(self.token_ids[part], self.logprobs[part], self.ranks[part])

    def places(self) -> Iterator[Place]:
        """Place by place, as Python's numbers."""
        columns = self.token_ids.tolist(), self.logprobs.tolist(), self.ranks.tolist()
        for values in zip(*columns, strict=True):
            yield [TokenLogprob(*token) for token in zip(*values, strict=True)]

    def pack(self) -> tuple[Any, ...]:
        """Values that msgpack takes."""
        columns = self.token_ids.shape[1]
        return columns, self.token_ids.tobytes(), self.logprobs.tobytes(), self.ranks.tobytes()

    @classmethod
    def unpack(cls, values: tuple[Any, ...]) -> "LogprobTable":
        """The inverse of `pack`."""
        columns, token_ids, logprobs, ranks = values
        return cls(
            np.frombuffer(token_ids, np.int32).reshape(-1, columns),
            np.frombuffer(logprobs, np.float32).reshape(-1, columns),
            np.frombuffer(ranks, np.int32).reshape(-1, columns),
        )


@dataclass(slots=True)
class LogprobLines:
    """Lines of tables one after the other, as bytes: an answer may have thousands of them."""

    num_top: int  # most likely tokens kept beside each
    _num_columns: int = 1
    _token_ids: bytearray = field(default_factory=bytearray)
    _logprobs: bytearray = field(default_factory=bytearray)
    _ranks: bytearray = field(default_factory=bytearray)

    def append(self, table: LogprobTable, line: int) -> None:
        """Add a line of a table, which has as many columns as earlier ones or more than are kept."""
        columns = slice(1 + self.num_top)
        self._num_columns = len(table.token_ids[line, columns])
        self._token_ids += table.token_ids[line, columns].tobytes()
        self._logprobs += table.logprobs[line, columns].tobytes()
        self._ranks += table.ranks[line, columns].tobytes()

    def __len__(self) -> int:
        return len(self._token_ids) // (4 * self._num_columns)

    def places(self) -> Iterator[Place]:
        """Line by line, as Python's numbers."""
        columns = self._num_columns, self._token_ids, self._logprobs, self._ranks
        return LogprobTable.unpack(columns).places()

"""Whether two engines gave the same tokens. Standard library only."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """The first token that is not the same; an id is None where a request's tokens end there."""

    request: int
    token: int
    wanted: int | None
    got: int | None

    def __str__(self) -> str:
        return f"request {self.request}, token {self.token}: {self.got} for {self.wanted}"


@dataclass(frozen=True)
class Agreement:
    """How many of the requests have the same tokens, and the first that has not."""

    equal: int
    requests: int
    first: Difference | None


def digest(token_ids: object) -> str:
    """16 hexadecimal digits for nested lists of ids."""
    return hashlib.sha256(json.dumps(token_ids).encode()).hexdigest()[:16]


def compare(wanted: list[list[int]], got: list[list[int]]) -> Agreement:
    """Request by request; both have as many."""
    first = None
    for request, (own, other) in enumerate(zip(wanted, got, strict=True)):
        if own != other:
            token = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), None)
            if token is None:  # one is the beginning of the other
                token = min(len(own), len(other))
            first = Difference(request, token, _at(own, token), _at(other, token))
            break
    equal = sum(own == other for own, other in zip(wanted, got, strict=True))
    return Agreement(equal, len(wanted), first)


def _at(ids: list[int], index: int) -> int | None:
    return ids[index] if index < len(ids) else None

"""Typed access to what a checkpoint says about itself; every complaint names the file and the field."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError


class CheckpointError(ConfigError):
    """A checkpoint that is missing, damaged, or of a kind that is not supported; the message says which and where."""


@dataclass(frozen=True)
class Fields:
    """The values of one JSON file or GGUF header. A null counts as absent; a field without default is required."""

    source: str
    values: Mapping[str, Any]

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.source}: {name}={value!r} must be a whole number of at least 1")
        return value

    def count(self, name: str, default: int) -> int:
        """A whole number of at least 0."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(f"{self.source}: {name}={value!r} must be a whole number of at least 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise CheckpointError(f"{self.source}: {name}={value!r} must be a number above 0")
        return float(value)

    def optional_integer(self, name: str, default: int | None = None) -> int | None:
        """As `integer`, but None for an explicit null, and for an absent field without default."""
        absent = default is None if name not in self.values else self.values[name] is None
        return None if absent else self.integer(name, default)

    def optional_number(self, name: str, default: float | None = None) -> float | None:
        """As `number`, but None for an explicit null, and for an absent field without default."""
        absent = default is None if name not in self.values else self.values[name] is None
        return None if absent else self.number(name, default)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.source}: {name}={value!r} must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.source}: {name}={value!r} must be a string")
        return value

    def group(self, name: str) -> "Fields":
        """The nested object of that name; empty if absent."""
        value = self._get(name, {})
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.source}: {name}={value!r} must be an object")
        return Fields(f"{self.source}: {name}", value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them; empty if absent."""
        value = self._get(name, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
            raise CheckpointError(
                f"{self.source}: {name}={value!r} must be a token id or a list of token ids"
            )
        return tuple(ids)

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def refuse(self, name: str, *accepted: object) -> None:
        """Raise if the field is present with a value that is none of `accepted`."""
        if self.has(name) and self.values[name] not in accepted:
            supported = " or ".join(repr(value) for value in accepted) or "to leave it out"
            raise CheckpointError(
                f"{self.source}: {name}={self.values[name]!r} is not supported; supported: {supported}"
            )

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.source}: {name} is missing")
        return value

"""The header of a GGUF file: metadata and tensor records.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Parsed here because every shard process does it
(0.1 s for a 49k-token vocabulary, where gguf.GGUFReader takes 2 s) and because a cut file must be reported as such.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType

from .fields import CheckpointError
from .tensor_info import STORED_TYPES, TensorInfo, listed

# Value type -> struct code, by the format's numbers; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")  # stands before a string
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key, and tensors by their GGUF names (shapes row-major, the reverse of the file's order)."""

    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    num_bytes: int  # up to the first tensor's bytes


def read_header(path: Path) -> GgufHeader:
    """Raises CheckpointError if this is no GGUF file of version 2 or 3, or if it is damaged or cut short."""
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise CheckpointError(f"{path}: not a GGUF file (it starts with {magic!r})")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, _Cursor(path, data))


class _Cursor:
    """Reads values in file order and never past the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 4

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        start = self._advance(count * struct.calcsize("<" + code))
        return struct.unpack_from(f"<{count}{code}", self.data, start)

    def integer(self, code: str) -> int:
        return int(self.scalars(code, 1)[0])

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """In a loop without calls of ours: a vocabulary has a hundred thousand."""
        data, size, end = self.data, len(self.data), self.position
        found = []
        for _ in range(count):
            start = end + LENGTH.size
            end = start + (LENGTH.unpack_from(data, end)[0] if start <= size else 0)
            if end > size:
                break
            found.append(data[start:end].decode(errors="replace"))
        self._advance(end - self.position)
        return found

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalars(SCALARS[kind], 1)[0]
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise CheckpointError(f"{self.path}: damaged GGUF header: unknown value type {kind}")
        item_kind, count = self.integer("I"), self.integer("Q")
        if item_kind in SCALARS:
            return list(self.scalars(SCALARS[item_kind], count))
        if item_kind == STRING:
            return self.strings(count)
        return [self.value(item_kind) for _ in range(count)]

    def _advance(self, num_bytes: int) -> int:
        start = self.position
        if num_bytes > len(self.data) - start:
            raise CheckpointError(
                f"{self.path}: GGUF file is cut short inside its header: byte {start + num_bytes} is needed, "
                f"the file has {len(self.data)}; fetch it again"
            )
        self.position = start + num_bytes
        return start


def _parse(path: Path, cursor: _Cursor) -> GgufHeader:
    version = cursor.integer("I")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: GGUF version {version} is not supported; supported: 2, 3")
    num_tensors, num_keys = cursor.integer("Q"), cursor.integer("Q")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.integer("I"))
    records = []
    for _ in range(num_tensors):
        name, num_dims = cursor.string(), cursor.integer("I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise CheckpointError(f"{path}: damaged GGUF header: tensor {name} has {num_dims} dimensions")
        shape = tuple(reversed(cursor.scalars("Q", num_dims)))
        records.append((name, shape, cursor.integer("I"), cursor.integer("Q")))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(f"{path}: damaged GGUF header: general.alignment={alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = [
        TensorInfo(name, shape, _type_name(path, name, kind, shape), path.name, data_start + offset)
        for name, shape, kind, offset in records
    ]
    cut = [info.name for info in tensors if info.offset + info.num_bytes > len(cursor.data)]
    if cut:
        needed = max(info.offset + info.num_bytes for info in tensors)
        raise CheckpointError(
            f"{path}: GGUF file is cut short: its tensors need {needed} bytes, the file has "
            f"{len(cursor.data)}; affected: {listed(cut)}; fetch it again"
        )
    return GgufHeader(metadata, tensors, data_start)


def _type_name(path: Path, name: str, kind: int, shape: tuple[int, ...]) -> str:
    known = {member.value: member.name for member in GGMLQuantizationType}
    type_name = known.get(kind, f"type {kind}")
    if type_name not in STORED_TYPES:
        raise CheckpointError(
            f"{path}: tensor {name} is stored as {type_name}, which is not supported; "
            f"supported: {', '.join(STORED_TYPES)}"
        )
    block, _ = STORED_TYPES[type_name]
    if math.prod(shape) < 1 or shape[-1] % block:
        raise CheckpointError(
            f"{path}: damaged GGUF header: tensor {name} of shape {list(shape)} cannot be stored in {type_name} "
            f"blocks of {block}"
        )
    return type_name

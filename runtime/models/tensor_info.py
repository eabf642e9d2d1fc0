"""Where a tensor lies in a file; the same record for safetensors and GGUF."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

# Stored types that can be read, by the names both formats use: elements per block, bytes per block.
STORED_TYPES: dict[str, tuple[int, int]] = {
    name: GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    for name in (
        *("F32", "F16", "BF16"),
        *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    )
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A row-major tensor at `offset` bytes into `file` (relative to the checkpoint's folder).

    `dtype` is a key of STORED_TYPES; blocks run along the last axis. If `permuted_head_dim` is set, the rows of each
    head of that size are stored as (i, i + half) pairs, as llama.cpp's rotary wants them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    permuted_head_dim: int | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the tensor seen as a matrix; a vector is one column."""
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        block, block_bytes = STORED_TYPES[self.dtype]
        return math.prod(self.shape[1:]) // block * block_bytes

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes


def listed(names: Iterable[object], limit: int = 5) -> str:
    """At most `limit` names for a message, then how many more."""
    items = [str(name) for name in names]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more

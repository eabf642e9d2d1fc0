"""What attention must know about a step besides tensors: who owns which heads, and how long each row is."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .host import to_device

T = TypeVar("T")
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class HeadLayout:
    """Which query heads of this shard read which local KV head.

    `q_per_kv[h]` query heads, contiguous and in order, read local KV head h. A shard that owns whole KV groups
    has an even layout, (3, 3, 3); one that owns parts of groups has a ragged one, (2, 3, 1).
    """

    q_per_kv: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.q_per_kv, "a shard owns at least one KV head"
        assert min(self.q_per_kv) >= 1, f"every local KV head has a query head, got q_per_kv={self.q_per_kv}"

    @cached_property
    def num_q_heads(self) -> int:
        """Query heads of this shard."""
        return sum(self.q_per_kv)

    @cached_property
    def num_kv_heads(self) -> int:
        """KV heads of this shard, replicated ones included."""
        return len(self.q_per_kv)

    @cached_property
    def is_even(self) -> bool:
        """True if every KV head has the same number of query heads."""
        return min(self.q_per_kv) == max(self.q_per_kv)


@dataclass
class AttentionMetadata:
    """The rows of one step, for one layer group. Built once a step, read by every layer of the group.

    R rows, T = sum of the query lengths. Query token i of row r sits at position
    `context_lens[r] - query_len[r] + i` of its sequence.

    query_start        [R + 1] int32: row r owns query tokens query_start[r] up to query_start[r + 1]
    context_lens       [R] int32: tokens of the row in the cache while attention runs, this step's included
    block_tables       [R, max_blocks] int32, rows of adjacent entries: cache block of each block_size tokens;
                       entries past the row's length are never read
    query_lens_host    [R] int32, host copy of the query lengths, so that planning needs no device sync
    context_lens_host  [R] int32, host copy of context_lens
    block_size         tokens per cache block
    max_query_len      largest query length
    max_context_len    largest context length
    """

    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    query_lens_host: Int32Array
    context_lens_host: Int32Array
    block_size: int
    num_tokens: int
    max_query_len: int
    max_context_len: int
    _prepared: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        query_lens: Int32Array,
        context_lens: Int32Array,
        block_tables: Tensor,
        block_size: int,
        device: torch.device | str,
    ) -> "AttentionMetadata":
        """Metadata of a step from the host's counts.

        query_lens, context_lens  [R] int32 on the host, 1 <= query_lens <= context_lens
        block_tables              [R, max_blocks] int32 on `device`, max_blocks * block_size >= every context
        """
        query_lens = np.ascontiguousarray(query_lens, dtype=np.int32)
        context_lens = np.ascontiguousarray(context_lens, dtype=np.int32)
        num_rows = len(query_lens)
        assert num_rows > 0, "a step has at least one row"
        assert context_lens.shape == (num_rows,), (
            f"{num_rows} query lengths, {context_lens.shape} context lengths"
        )
        assert query_lens.min() >= 1, "a row in a step has at least one new token"
        assert bool((query_lens <= context_lens).all()), "context_lens must include this step's tokens"
        max_context_len = int(context_lens.max())
        assert block_tables.ndim == 2, (
            f"block_tables: expected [R, max_blocks], got {list(block_tables.shape)}"
        )
        assert block_tables.shape[0] == num_rows, f"{num_rows} rows, {block_tables.shape[0]} block tables"
        assert block_tables.dtype == torch.int32, f"block_tables: expected int32, got {block_tables.dtype}"
        assert block_tables.shape[1] * block_size >= max_context_len, (
            f"{block_tables.shape[1]} blocks of {block_size} tokens cannot hold a context of {max_context_len}"
        )
        starts = np.zeros(num_rows + 1, dtype=np.int32)
        np.cumsum(query_lens, out=starts[1:])
        return cls(
            query_start=to_device(starts, device),
            context_lens=to_device(context_lens, device),
            block_tables=block_tables,
            query_lens_host=query_lens,
            context_lens_host=context_lens,
            block_size=block_size,
            num_tokens=int(starts[-1]),
            max_query_len=int(query_lens.max()),
            max_context_len=max_context_len,
        )

    def with_tables(self, block_tables: Tensor) -> "AttentionMetadata":
        """The same rows in another layer group, whose block tables have the same shape."""
        return replace(self, block_tables=block_tables, _prepared={})

    def prepare(self, key: Hashable, make: Callable[[], T], refill: Callable[[T], None] | None = None) -> T:
        """The back end's plan for this step, made by the first layer that asks and reused by the others.

        `refill` rewrites a plan in its place after `refill` of this step; None if it does not depend on lengths.
        """
        if key not in self._prepared:
            self._prepared[key] = make(), refill
        plan: T = self._prepared[key][0]
        return plan

    def refill(self, context_lens: Int32Array, block_tables: Tensor) -> None:
        """Makes this the metadata of another step with as many rows and the same query lengths, in the same device
        memory: for a captured CUDA graph, which reads from fixed addresses and launches fixed grids.

        The metadata were built with the longest contexts of all the steps to come; plans that the back end has made for
        them are rewritten. The host does not wait.

        context_lens  [R] int32 on the host, none longer than when built
        block_tables  [up to R, max_blocks] int32 on the device, no wider than when built; rows past them keep theirs
        """
        context_lens = np.ascontiguousarray(context_lens, dtype=np.int32)
        assert context_lens.shape == self.context_lens_host.shape, f"{len(context_lens)} rows"
        assert bool((self.query_lens_host <= context_lens).all()), (
            "context_lens must include this step's tokens"
        )
        assert int(context_lens.max()) <= self.max_context_len, (
            f"a context of {context_lens.max()}, planned for at most {self.max_context_len}"
        )
        self.context_lens_host = context_lens
        self.context_lens.copy_(to_device(context_lens, self.context_lens.device))
        num_rows, num_blocks = block_tables.shape
        self.block_tables[:num_rows, :num_blocks].copy_(block_tables)
        for plan, refill in self._prepared.values():
            if refill is not None:
                refill(plan)

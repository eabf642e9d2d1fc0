"""Which rows of a step are attended together, and where their keys lie: worked out once a step with numpy."""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..metadata import AttentionMetadata, HeadLayout

# Rows whose context is shorter than this share a bucket: padding them costs less than another round of torch calls.
SHORT_CONTEXT = 256
# Longer contexts are padded to a multiple of the chunk that torch's flash kernel takes at once. A row then meets
# matrix products of the same shape alone and in any batch, and so gets the same bits.
LONG_CONTEXT_STEP = 512
# Rows of 2 to this many new tokens are padded to it, longer ones to a multiple of the fewest queries that the flash
# kernel takes at once: products with few rows are computed on other paths, with other bits.
SHORT_QUERY = 16
LONG_QUERY_STEP = 32
# Keys gathered at once, in tokens: bounds the copies when many rows have long contexts.
MAX_GATHERED_TOKENS = 65536

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Rows:
    """Some rows of the step as parallel arrays [n]; the visible blocks are first_block and the num_blocks from it."""

    number: Int64Array
    query_start: Int64Array
    query_len: Int64Array
    context_len: Int64Array
    first_block: Int64Array
    num_blocks: Int64Array

    def take(self, places: Int64Array) -> "_Rows":
        return _Rows(*(getattr(self, field.name)[places] for field in fields(self)))


@dataclass(frozen=True)
class Bucket:
    """Rows of similar shape, padded to n rows x Q queries x L positions. S is the KV streams of a row.

    A decode bucket (Q = 1) has a stream per KV head, and that head's query heads stand in the place of queries.
    Else there is a stream per query head, so that one mask serves every head.

    token_index   [n * Q] int64: query token at each place; padding repeats the row's last token
    real_places   [m] int64: the places that are no padding, None if all are
    real_tokens   [m] int64: their query tokens
    block_index   [n * S * blocks] int64: rows of the cache seen as [num_blocks * Hk, block_size * D]
    unwritten     [u] int64: rows of the gathered keys seen as [n * S * L, D] that come from slots without a token
    mask          [n, 1, Q, L]: 0 where the query sees the position, -inf elsewhere
    """

    num_rows: int
    num_queries: int
    num_positions: int
    token_index: Tensor
    real_places: Tensor | None
    real_tokens: Tensor
    block_index: Tensor
    unwritten: Tensor
    mask: Tensor


def plan_buckets(
    meta: AttentionMetadata, heads: HeadLayout, window: int | None, dtype: torch.dtype
) -> list[Bucket]:
    """Groups the rows by powers of two of query length and visible context, so that little is padding."""
    rows = _visible_rows(meta, window)
    query_class = np.where(rows.query_len == 1, 0, _log2_up(np.maximum(rows.query_len, SHORT_QUERY)))
    context_class = _log2_up(np.maximum(rows.num_blocks * meta.block_size, SHORT_CONTEXT))
    _, bucket_of_row = np.unique(query_class * 64 + context_class, return_inverse=True)
    buckets = []
    for number in range(int(bucket_of_row.max()) + 1):
        members = np.flatnonzero(bucket_of_row == number)
        longest = int(rows.num_blocks[members].max()) * meta.block_size
        if longest > SHORT_CONTEXT:
            longest = -(-longest // LONG_CONTEXT_STEP) * LONG_CONTEXT_STEP
        step = max(1, MAX_GATHERED_TOKENS // longest)
        for begin in range(0, len(members), step):
            some = rows.take(members[begin : begin + step])
            buckets.append(_bucket(some, -(-longest // meta.block_size), meta, heads, window, dtype))
    return buckets


def _visible_rows(meta: AttentionMetadata, window: int | None) -> _Rows:
    query_len = meta.query_lens_host.astype(np.int64)
    context_len = meta.context_lens_host.astype(np.int64)
    first_visible = np.zeros_like(context_len)
    if window is not None:
        first_visible = np.maximum(context_len - query_len - window + 1, 0)
    first_block = first_visible // meta.block_size
    return _Rows(
        number=np.arange(len(query_len)),
        query_start=np.cumsum(query_len) - query_len,
        query_len=query_len,
        context_len=context_len,
        first_block=first_block,
        num_blocks=-(-context_len // meta.block_size) - first_block,
    )


def _log2_up(values: Int64Array) -> Int64Array:
    return np.ceil(np.log2(values)).astype(np.int64)


def _bucket(
    rows: _Rows,
    most_blocks: int,
    meta: AttentionMetadata,
    heads: HeadLayout,
    window: int | None,
    dtype: torch.dtype,
) -> Bucket:
    """The bucket of these rows, each padded to their longest query and to `most_blocks` blocks."""
    block_size = meta.block_size
    num_rows = len(rows.number)
    most_queries = int(rows.query_len.max())
    if most_queries > SHORT_QUERY:
        most_queries = -(-most_queries // LONG_QUERY_STEP) * LONG_QUERY_STEP
    elif most_queries > 1:
        most_queries = SHORT_QUERY
    num_positions = most_blocks * block_size
    num_kv_heads = heads.num_kv_heads
    streams = np.arange(num_kv_heads)
    if most_queries > 1:
        streams = np.repeat(streams, heads.q_per_kv)
    first_block, context_len, query_len = (
        x[:, None] for x in (rows.first_block, rows.context_len, rows.query_len)
    )

    query = np.arange(most_queries)
    query_in_row = np.minimum(query, query_len - 1)
    tokens = rows.query_start[:, None] + query_in_row
    is_real = query < query_len

    # Blocks past a row's end are filled with the row's own first block: masked out, but always readable, and
    # unlike a foreign block it cannot carry another row's NaN into this one.
    column = np.arange(most_blocks)
    column = first_block + np.where(column < rows.num_blocks[:, None], column, 0)
    block_ids = meta.block_tables.numpy()[rows.number[:, None], column].astype(np.int64)
    block_index = block_ids[:, None, :] * num_kv_heads + streams[:, None]

    # A weight of 0 does not silence a NaN, so what comes from a slot without a token is set to zero.
    source = (column[:, :, None] * block_size + np.arange(block_size)).reshape(num_rows, num_positions)
    row, position = np.nonzero(source >= context_len)
    unwritten = (row[:, None] * len(streams) + np.arange(len(streams))) * num_positions + position[:, None]

    key_position = (first_block * block_size + np.arange(num_positions))[:, None, :]
    query_position = (context_len - query_len + query_in_row)[:, :, None]
    visible = key_position <= query_position
    if window is not None:
        visible &= key_position > query_position - window
    mask = torch.zeros(visible.shape, dtype=dtype)
    mask.masked_fill_(torch.from_numpy(~visible), float("-inf"))

    return Bucket(
        num_rows=num_rows,
        num_queries=most_queries,
        num_positions=num_positions,
        token_index=torch.from_numpy(tokens.reshape(-1)),
        real_places=None if is_real.all() else torch.from_numpy(np.flatnonzero(is_real)),
        real_tokens=torch.from_numpy(tokens[is_real]),
        block_index=torch.from_numpy(block_index.reshape(-1)),
        unwritten=torch.from_numpy(unwritten.reshape(-1)),
        mask=mask.unsqueeze(1),
    )

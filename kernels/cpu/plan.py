"""Which rows of a step are attended together, and where their keys lie: worked out once a step with numpy."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..metadata import AttentionMetadata, HeadLayout

# Rows whose context is shorter than this share a bucket: padding them costs less than another round of torch calls.
SHORT_CONTEXT = 256
# Prompts up to this long share a bucket for the same reason.
SHORT_QUERY = 16
# Keys gathered at once, in tokens: bounds the copies when many rows have long contexts.
MAX_GATHERED_TOKENS = 65536

Int64Array = npt.NDArray[np.int64]


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
    query_lens = meta.query_lens_host.astype(np.int64)
    context_lens = meta.context_lens_host.astype(np.int64)
    starts = np.cumsum(query_lens) - query_lens
    first_visible = np.zeros_like(context_lens)
    if window is not None:
        first_visible = np.maximum(context_lens - query_lens - window + 1, 0)
    first_block = first_visible // meta.block_size
    num_blocks = -(-context_lens // meta.block_size) - first_block
    span = np.maximum(num_blocks * meta.block_size, SHORT_CONTEXT)
    query_class = np.where(query_lens == 1, 0, _log2_up(np.maximum(query_lens, SHORT_QUERY)))
    _, bucket_of_row = np.unique(query_class * 64 + _log2_up(span), return_inverse=True)
    buckets = []
    for number in range(int(bucket_of_row.max()) + 1):
        members = np.flatnonzero(bucket_of_row == number)
        longest = int(num_blocks[members].max()) * meta.block_size
        step = max(1, MAX_GATHERED_TOKENS // longest)
        for begin in range(0, len(members), step):
            rows = members[begin : begin + step]
            buckets.append(
                _bucket(
                    meta,
                    heads,
                    window,
                    dtype,
                    rows,
                    starts[rows],
                    query_lens[rows],
                    context_lens[rows],
                    first_block[rows],
                    num_blocks[rows],
                )
            )
    return buckets


def _log2_up(values: Int64Array) -> Int64Array:
    return np.ceil(np.log2(values)).astype(np.int64)


def _bucket(
    meta: AttentionMetadata,
    heads: HeadLayout,
    window: int | None,
    dtype: torch.dtype,
    rows: Int64Array,
    starts: Int64Array,
    query_lens: Int64Array,
    context_lens: Int64Array,
    first_block: Int64Array,
    num_blocks: Int64Array,
) -> Bucket:
    block_size = meta.block_size
    most_queries = int(query_lens.max())
    most_blocks = int(num_blocks.max())
    num_positions = most_blocks * block_size
    num_kv_heads = heads.num_kv_heads
    streams = np.arange(num_kv_heads)
    if most_queries > 1:
        streams = np.repeat(streams, heads.q_per_kv)

    query = np.arange(most_queries)
    query_in_row = np.minimum(query, query_lens[:, None] - 1)
    tokens = starts[:, None] + query_in_row
    is_real = query < query_lens[:, None]

    # Blocks past a row's end are filled with the row's own first block: masked out, but always readable, and
    # unlike a foreign block it cannot carry another row's NaN into this one.
    column = np.arange(most_blocks)
    column = first_block[:, None] + np.where(column < num_blocks[:, None], column, 0)
    block_ids = meta.block_tables.numpy()[rows[:, None], column].astype(np.int64)
    block_index = block_ids[:, None, :] * num_kv_heads + streams[:, None]

    # A weight of 0 does not silence a NaN, so what comes from a slot without a token is set to zero.
    source = (column[:, :, None] * block_size + np.arange(block_size)).reshape(len(rows), num_positions)
    row, position = np.nonzero(source >= context_lens[:, None])
    unwritten = (row[:, None] * len(streams) + np.arange(len(streams))) * num_positions + position[:, None]

    key_position = first_block[:, None] * block_size + np.arange(num_positions)
    query_position = (context_lens - query_lens)[:, None] + query_in_row
    visible = key_position[:, None, :] <= query_position[:, :, None]
    if window is not None:
        visible &= key_position[:, None, :] > query_position[:, :, None] - window
    mask = torch.zeros(visible.shape, dtype=dtype)
    mask.masked_fill_(torch.from_numpy(~visible), float("-inf"))

    return Bucket(
        num_rows=len(rows),
        num_queries=most_queries,
        num_positions=num_positions,
        token_index=torch.from_numpy(tokens.reshape(-1)),
        real_places=None if is_real.all() else torch.from_numpy(np.flatnonzero(is_real)),
        real_tokens=torch.from_numpy(tokens[is_real]),
        block_index=torch.from_numpy(block_index.reshape(-1)),
        unwritten=torch.from_numpy(unwritten.reshape(-1)),
        mask=mask.unsqueeze(1),
    )

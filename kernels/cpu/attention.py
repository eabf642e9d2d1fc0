"""Paged attention on CPU: gather a bucket's keys and values through the block table, then torch's flash kernel."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..metadata import AttentionMetadata, HeadLayout
from .plan import Bucket, plan_buckets


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    heads: HeadLayout,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """See `ops.paged_attention`. A few torch calls per bucket of rows; a decode step is usually one bucket."""
    buckets = meta.prepare(
        ("cpu", heads, window, q.dtype), lambda: plan_buckets(meta, heads, window, q.dtype)
    )
    out = torch.empty(q.shape, dtype=q.dtype)
    for bucket in buckets:
        k = _gather(k_cache, bucket)
        v = _gather(v_cache, bucket)
        queries = q.index_select(0, bucket.token_index)
        if bucket.num_queries == 1:
            attended = _decode(queries, k, v, bucket, heads, scale)
        else:
            attended = _prefill(queries, k, v, bucket, scale)
        if bucket.real_places is not None:
            attended = attended.index_select(0, bucket.real_places)
        out.index_copy_(0, bucket.real_tokens, attended)
    return out


def _gather(cache: Tensor, bucket: Bucket) -> Tensor:
    """Keys or values of the bucket, [n, S, L, D], zero where no token was written."""
    num_blocks, num_kv_heads, block_size, head_dim = cache.shape
    rows = cache.view(num_blocks * num_kv_heads, block_size * head_dim)
    gathered = rows.index_select(0, bucket.block_index).view(-1, head_dim)
    if bucket.unwritten.shape[0]:
        gathered.index_fill_(0, bucket.unwritten, 0)
    return gathered.view(bucket.num_rows, -1, bucket.num_positions, head_dim)


def _decode(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, heads: HeadLayout, scale: float) -> Tensor:
    """One query per row: the query heads of a KV head share one pass over its keys. q [n, Hq, D] -> [n, Hq, D]."""
    if not heads.is_even:
        padded, places = _ragged_index(heads)
        q = q.index_select(1, padded)
    grouped = q.view(bucket.num_rows, heads.num_kv_heads, -1, q.shape[2])
    attended = F.scaled_dot_product_attention(grouped, k, v, attn_mask=bucket.mask, scale=scale)
    attended = attended.reshape(q.shape)
    return attended if heads.is_even else attended.index_select(1, places)


def _prefill(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, scale: float) -> Tensor:
    """Many queries per row, keys gathered once per query head. q [n * Q, Hq, D] -> [n * Q, Hq, D]."""
    rows = q.view(bucket.num_rows, bucket.num_queries, *q.shape[1:]).transpose(1, 2)
    attended = F.scaled_dot_product_attention(rows, k, v, attn_mask=bucket.mask, scale=scale)
    return attended.transpose(1, 2).reshape(q.shape)


@lru_cache
def _ragged_index(heads: HeadLayout) -> tuple[Tensor, Tensor]:
    """Query heads with each group padded to the widest one by repeating its last head; where the real ones stand."""
    widest = max(heads.q_per_kv)
    padded: list[int] = []
    places: list[int] = []
    first = 0
    for group, count in enumerate(heads.q_per_kv):
        padded += [first + min(i, count - 1) for i in range(widest)]
        places += [group * widest + i for i in range(count)]
        first += count
    return torch.tensor(padded), torch.tensor(places)

"""Paged attention: one kernel for decode, prefill and chunked prefill, and one that joins chunks of the context.

A program holds the query heads of one KV head for some query positions, and walks the cache in chunks that start
at fixed positions of the sequence. Within a chunk it keeps a running softmax (FlashAttention-2, Dao, 2023); chunks
are joined by their logsumexp (Flash-Decoding, Dao et al., 2023), always in order and by the same code, be it in one
program or in the combine kernel. So a query's bits do not depend on the other rows. Compiled, they may depend on which
of the two tiles its row took (see plan.py): tiles of other shapes add the terms of a chunk in another order.

Logits and logsumexp are in base 2: scale * log2(e) is folded into one factor.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..metadata import AttentionMetadata, HeadLayout
from ..tiles import AttentionTiles, attention_tiles
from .plan import WorkList, head_groups_table, plan_work

LOG2_E = 1.4426950408889634
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@triton.jit
def _join(out, weight, top, chunk_out, chunk_lse):
    """Adds a chunk's normalised output, with its base-2 logsumexp, to the running (sum, weight, largest lse)."""
    new_top = tl.maximum(top, chunk_lse)
    safe = tl.where(
        new_top == float("-inf"), 0.0, new_top
    )  # nothing visible so far: -inf - -inf would be NaN
    keep = tl.exp2(top - safe)
    add = tl.exp2(chunk_lse - safe)
    return out * keep[:, None] + chunk_out * add[:, None], weight * keep + add, new_top


@triton.jit
def attention_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    items_ptr,
    query_start_ptr,
    context_lens_ptr,
    block_tables_ptr,
    head_groups_ptr,
    scale_log2,
    q_stride,
    q_head_stride,
    out_stride,
    table_stride,
    block_size,
    window,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOWED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attends one work item with one KV head. Grid: (items, local KV heads).

    Row m of the tile is query position first_query + m // GROUP and the (m % GROUP)-th query head of the KV head.
    Writes the output, or for one chunk of several its output [TILE_ROWS, CHANNELS] and logsumexp [TILE_ROWS].
    """
    item_ptr = items_ptr + tl.program_id(0) * 5
    kv_head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    row = tl.load(item_ptr).to(tl.int64)
    first_query = tl.load(item_ptr + 1)
    first_chunk = tl.load(item_ptr + 2)
    end_chunk = tl.load(item_ptr + 3)
    partial = tl.load(item_ptr + 4).to(tl.int64)
    query_begin = tl.load(query_start_ptr + row)
    query_len = tl.load(query_start_ptr + row + 1) - query_begin
    context_len = tl.load(context_lens_ptr + row)
    first_head = tl.load(head_groups_ptr + kv_head * 2)
    num_heads = tl.load(head_groups_ptr + kv_head * 2 + 1)

    tile_row = tl.arange(0, TILE_ROWS)
    query = first_query + tile_row // GROUP
    head = tile_row % GROUP
    is_query = (query < query_len) & (head < num_heads)
    channel = tl.arange(0, CHANNELS)
    is_channel = channel < HEAD_DIM
    token = (query_begin + query).to(tl.int64)
    q = tl.load(
        q_ptr + token[:, None] * q_stride + (first_head + head)[:, None] * q_head_stride + channel[None, :],
        mask=is_query[:, None] & is_channel[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)
    position = context_len - query_len + query
    last_query = tl.minimum(first_query + TILE_ROWS // GROUP, query_len) - 1
    end = context_len - query_len + last_query + 1  # causal: nothing later is visible to this tile
    begin = 0
    if WINDOWED:
        begin = tl.maximum(context_len - query_len + first_query - window + 1, 0) // BLOCK_N * BLOCK_N

    out = tl.zeros([TILE_ROWS, CHANNELS], tl.float32)
    weight = tl.zeros([TILE_ROWS], tl.float32)
    top = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    table_ptr = block_tables_ptr + row * table_stride
    offset = tl.arange(0, BLOCK_N)
    for chunk in range(first_chunk, end_chunk):
        acc = tl.zeros([TILE_ROWS, CHANNELS], tl.float32)
        total = tl.zeros([TILE_ROWS], tl.float32)
        largest = tl.full([TILE_ROWS], float("-inf"), tl.float32)
        for start in range(tl.maximum(chunk * CHUNK, begin), tl.minimum((chunk + 1) * CHUNK, end), BLOCK_N):
            key_position = start + offset
            is_key = key_position < end
            block = tl.load(table_ptr + key_position // block_size, mask=is_key, other=0).to(tl.int64)
            slot = (block * num_kv_heads + kv_head) * block_size + key_position % block_size
            place = slot[:, None] * HEAD_DIM + channel[None, :]
            is_value = is_key[:, None] & is_channel[None, :]
            k = tl.load(k_cache_ptr + place, mask=is_value, other=0.0)
            v = tl.load(v_cache_ptr + place, mask=is_value, other=0.0)
            if UPCAST:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            visible = key_position[None, :] <= position[:, None]
            if WINDOWED:
                visible = visible & (key_position[None, :] > position[:, None] - window)
            logits = tl.where(visible, logits, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(logits, 1))
            safe = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            p = tl.exp2(logits - safe[:, None])
            fade = tl.exp2(largest - safe)
            total = total * fade + tl.sum(p, 1)
            acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            largest = new_largest
        nonzero = tl.where(total == 0.0, 1.0, total)  # no position of this chunk is visible to the query
        lse = largest + tl.log2(nonzero)
        out, weight, top = _join(out, weight, top, acc / nonzero[:, None], lse)

    if partial >= 0:
        # One chunk: joining it to nothing has left its output and logsumexp as they were.
        slot = (partial * num_kv_heads + kv_head) * TILE_ROWS + tile_row
        tl.store(partial_lse_ptr + slot, top, mask=is_query)
        tl.store(partial_out_ptr + slot[:, None] * CHANNELS + channel[None, :], out, mask=is_query[:, None])
    else:
        weight = tl.where(is_query, weight, 1.0)  # padding rows may see nothing
        tl.store(
            out_ptr
            + token[:, None] * out_stride
            + (first_head + head)[:, None] * HEAD_DIM
            + channel[None, :],
            (out / weight[:, None]).to(out_ptr.dtype.element_ty),
            mask=is_query[:, None] & is_channel[None, :],
        )


@triton.jit
def combine_kernel(
    out_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    combined_ptr,
    query_start_ptr,
    head_groups_ptr,
    out_stride,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Joins the chunks of one query tile in order and writes the output. Grid: (tiles in parts, local KV heads)."""
    item_ptr = combined_ptr + tl.program_id(0) * 4
    kv_head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    row = tl.load(item_ptr).to(tl.int64)
    first_query = tl.load(item_ptr + 1)
    first_partial = tl.load(item_ptr + 2).to(tl.int64)
    num_partials = tl.load(item_ptr + 3)
    query_begin = tl.load(query_start_ptr + row)
    query_len = tl.load(query_start_ptr + row + 1) - query_begin
    first_head = tl.load(head_groups_ptr + kv_head * 2)
    num_heads = tl.load(head_groups_ptr + kv_head * 2 + 1)

    tile_row = tl.arange(0, TILE_ROWS)
    query = first_query + tile_row // GROUP
    head = tile_row % GROUP
    is_query = (query < query_len) & (head < num_heads)
    channel = tl.arange(0, CHANNELS)
    out = tl.zeros([TILE_ROWS, CHANNELS], tl.float32)
    weight = tl.zeros([TILE_ROWS], tl.float32)
    top = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    for number in range(first_partial, first_partial + num_partials):
        slot = (number * num_kv_heads + kv_head) * TILE_ROWS + tile_row
        lse = tl.load(partial_lse_ptr + slot, mask=is_query, other=float("-inf"))
        chunk_out = tl.load(
            partial_out_ptr + slot[:, None] * CHANNELS + channel[None, :], mask=is_query[:, None], other=0.0
        )
        out, weight, top = _join(out, weight, top, chunk_out, lse)
    weight = tl.where(is_query, weight, 1.0)
    token = (query_begin + query).to(tl.int64)
    tl.store(
        out_ptr + token[:, None] * out_stride + (first_head + head)[:, None] * HEAD_DIM + channel[None, :],
        (out / weight[:, None]).to(out_ptr.dtype.element_ty),
        mask=is_query[:, None] & (channel < HEAD_DIM)[None, :],
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    heads: HeadLayout,
    scale: float,
    window: int | None = None,
    tiles: AttentionTiles | None = None,
) -> Tensor:
    """See `ops.paged_attention`. One launch for decode rows and one for prefill rows, those that the step has."""
    if tiles is None:
        tiles = attention_tiles(q.shape[2], k_cache.element_size())
    chosen = tiles
    group = triton.next_power_of_2(max(heads.q_per_kv))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    plans = meta.prepare(("triton", chosen, group, window), lambda: plan_work(meta, chosen, group, window))
    for work in plans:
        _launch(work, q, k_cache, v_cache, out, meta, heads, group, scale, window)
    return out


def _launch(
    work: WorkList,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    meta: AttentionMetadata,
    heads: HeadLayout,
    group: int,
    scale: float,
    window: int | None,
) -> None:
    head_dim = q.shape[2]
    channels = max(triton.next_power_of_2(head_dim), 16)
    tile_rows = max(work.tile_queries * group, 16)
    partial_shape = (work.num_partials, heads.num_kv_heads, tile_rows, channels)
    partial_out = torch.empty(partial_shape, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(partial_shape[:3], dtype=torch.float32, device=q.device)
    head_groups = head_groups_table(heads, q.device)
    attention_kernel[(work.items.shape[0], heads.num_kv_heads)](
        q,
        k_cache,
        v_cache,
        out,
        partial_out,
        partial_lse,
        work.items,
        meta.query_start,
        meta.context_lens,
        meta.block_tables,
        head_groups,
        scale * LOG2_E,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        meta.block_tables.stride(0),
        meta.block_size,
        window or 0,
        HEAD_DIM=head_dim,
        CHANNELS=channels,
        GROUP=group,
        TILE_ROWS=tile_rows,
        BLOCK_N=work.tile.block_n,
        CHUNK=work.tile.chunk,
        WINDOWED=window is not None,
        UPCAST=INTERPRETED,
        num_warps=work.tile.num_warps,
        num_stages=work.tile.num_stages,
    )
    if work.num_partials:
        combine_kernel[(work.combined.shape[0], heads.num_kv_heads)](
            out,
            partial_out,
            partial_lse,
            work.combined,
            meta.query_start,
            head_groups,
            out.stride(0),
            HEAD_DIM=head_dim,
            CHANNELS=channels,
            GROUP=group,
            TILE_ROWS=tile_rows,
            num_warps=4,
        )

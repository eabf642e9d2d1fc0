"""What the parts of an attention result have in common: whose they are, how they are joined, how the output is
written; and the kernel that joins parts written by several programs (Flash-Decoding, Dao et al., 2023).

A part is the normalised output of some positions of the context and its base-2 logsumexp.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(float("-inf"))


@triton.jit
def tile_queries(
    row,
    first_query,
    query_start_ptr,
    head_groups_ptr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """The rows of a tile: row m is query position first_query + m // GROUP and the (m % GROUP)-th query head of the
    KV head. Returns each one's query position in its row, token, head, whether it exists, and the row's query length.
    """
    kv_head = tl.program_id(1)
    query_begin = tl.load(query_start_ptr + row)
    query_len = tl.load(query_start_ptr + row + 1) - query_begin
    first_head = tl.load(head_groups_ptr + kv_head * 2)
    num_heads = tl.load(head_groups_ptr + kv_head * 2 + 1)
    tile_row = tl.arange(0, TILE_ROWS)
    query = first_query + tile_row // GROUP
    token = (query_begin + query).to(tl.int64)
    head = (first_head + tile_row % GROUP).to(tl.int64)
    is_query = (query < query_len) & (tile_row % GROUP < num_heads)
    return query, token, head, is_query, query_len


@triton.jit
def join(weight, top, lse):
    """What joins a result of logsumexp `lse` to a running sum: the factors of the sum and of the result, then the new
    weight of the sum and the largest logsumexp so far. NaN stays NaN.
    """
    new_top = tl.maximum(top, lse, propagate_nan=tl.PropagateNan.ALL)
    safe = tl.where(new_top == NEVER, 0.0, new_top)  # nothing visible so far: -inf - -inf would be NaN
    keep = tl.exp2(top - safe)
    add = tl.exp2(lse - safe)
    return keep, add, tl.fma(weight, keep, add), new_top


@triton.jit
def add_part(out, keep, chunk_out, add):
    """One rounding a product, however the compiler would have fused them: both kernels must give the same bits."""
    return tl.fma(out, keep[:, None], chunk_out * add[:, None])


@triton.jit
def finish(weight, top, token, head, is_query, sinks_ptr, lse_ptr, lse_stride):
    """Joins the sinks, writes the logsumexp, and returns the factor that makes the sum the output."""
    keep = 1.0
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=is_query, other=0.0) * LOG2_E
        keep, _, weight, top = join(weight, top, sink)
    weight = tl.where(is_query, weight, 1.0)  # padding rows may see nothing
    if lse_ptr is not None:
        tl.store(lse_ptr + token * lse_stride + head, (top + tl.log2(weight)) * LN_2, mask=is_query)
    return keep / weight


@triton.jit
def combine_kernel(
    sinks_ptr,
    out_ptr,
    lse_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    combined_ptr,
    query_start_ptr,
    head_groups_ptr,
    out_stride,
    lse_stride,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Joins the chunks of one query tile in order and writes the output. Grid: (tiles in parts, local KV heads)."""
    item_ptr = combined_ptr + tl.program_id(0) * 4
    kv_head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    first_partial = tl.load(item_ptr + 2).to(tl.int64)
    num_partials = tl.load(item_ptr + 3)
    _, token, head, is_query, _ = tile_queries(
        tl.load(item_ptr).to(tl.int64),
        tl.load(item_ptr + 1),
        query_start_ptr,
        head_groups_ptr,
        GROUP,
        TILE_ROWS,
    )
    channel = tl.arange(0, CHANNELS)[None, :]
    is_out = is_query[:, None] & (channel < HEAD_DIM)
    out = tl.zeros([TILE_ROWS, CHANNELS], tl.float32)
    weight = tl.zeros([TILE_ROWS], tl.float32)
    top = tl.full([TILE_ROWS], NEVER, tl.float32)
    for number in range(first_partial, first_partial + num_partials):
        slot = (number * num_kv_heads + kv_head) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        lse = tl.load(partial_lse_ptr + slot, mask=is_query, other=NEVER)
        chunk_out = tl.load(partial_out_ptr + slot[:, None] * HEAD_DIM + channel, mask=is_out, other=0.0)
        keep, add, weight, top = join(weight, top, lse)
        out = add_part(out, keep, chunk_out, add)
    factor = finish(weight, top, token, head, is_query, sinks_ptr, lse_ptr, lse_stride)[:, None]
    place = out_ptr + token[:, None] * out_stride + head[:, None] * HEAD_DIM + channel
    tl.store(place, (out * factor).to(out_ptr.dtype.element_ty), mask=is_out)

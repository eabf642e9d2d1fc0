"""The kernel of paged attention.

A program holds the query heads of one KV head for some query positions, and walks the cache in chunks that start
at fixed positions of the sequence. Within a chunk it keeps a running softmax (FlashAttention-2, Dao, 2023); chunks
are joined by their logsumexp, always in order and by the same code, be it in one program or in the combine kernel. So
a query's bits do not depend on the other rows. Compiled, they may depend on which of the two tiles its row took (see
plan.py): tiles of other shapes add the terms of a chunk in another order.

Logits are in base 2. Codes of a quantised cache enter the products as they are, exact in the dtype of q. Scales of
keys are factors of the logits' columns, scales of values are factors of the weights, before these are rounded for the
second product.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from .codes import decoded
from .combine import NEVER, add_part, finish, join, tile_queries


@triton.jit
def _capped(logits, cap_log2):
    """cap * tanh(y / cap) from 2 log2(e) y / cap: tanh(z) = (1 - t) / (1 + t), t = exp(-2 |z|), never overflows."""
    t = tl.exp2(-tl.abs(logits))
    size = cap_log2 * ((1.0 - t) / (1.0 + t))
    return tl.where(logits < 0.0, -size, size)


@triton.jit
def _block_ids(table_ptr, position, end, BLOCK_SIZE: tl.constexpr):
    """The cache blocks of these positions; no entry past `end` is read."""
    return tl.load(table_ptr + position.to(tl.uint32) // BLOCK_SIZE, mask=position < end, other=0)


@triton.jit
def _slots(block, position, kv_head, num_kv_heads, BLOCK_SIZE: tl.constexpr):
    """The cache rows of these positions, counted over the whole cache: these pass 2**31 times the row's width."""
    return (block.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_SIZE + position.to(tl.uint32) % BLOCK_SIZE


@triton.jit
def attention_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    items_ptr,
    query_start_ptr,
    context_lens_ptr,
    block_tables_ptr,
    head_groups_ptr,
    logit_factor,
    cap_log2,
    window,
    q_stride,
    q_head_stride,
    out_stride,
    lse_stride,
    table_stride,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attends one work item with one KV head. Grid: (items, local KV heads).

    Writes the output, or for one chunk of several its output [TILE_ROWS, HEAD_DIM] and logsumexp [TILE_ROWS].
    k_scale, v_scale, sinks, lse, cap_log2 and window may be None. logit_factor makes base-2 logits of q . k, or with
    a cap the argument of _capped. CHANNELS are those of a cache row, padded: with int4 the lower halves of the bytes
    are the first HEAD_DIM / 2 channels and the upper halves the others (here "high"), each with products of its own.
    """
    item_ptr = items_ptr + tl.program_id(0) * 5
    kv_head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    row = tl.load(item_ptr).to(tl.int64)
    first_query = tl.load(item_ptr + 1)
    first_chunk = tl.load(item_ptr + 2)
    end_chunk = tl.load(item_ptr + 3)
    partial = tl.load(item_ptr + 4).to(tl.int64)
    query, token, head, is_query, query_len = tile_queries(
        row, first_query, query_start_ptr, head_groups_ptr, GROUP, TILE_ROWS
    )
    WIDTH: tl.constexpr = HEAD_DIM // 2 if FORMAT == "int4" else HEAD_DIM
    # Powers of two, so nothing is lost: what a decoded number is short of its code, and a factor that keeps weight *
    # scale of values between float16's subnormal numbers and its largest (fp8 has it in its code unit already).
    CODE_UNIT: tl.constexpr = 256.0 if FORMAT == "fp8" else 0.0625 if FORMAT == "int4" else 1.0
    OUT_UNIT: tl.constexpr = 64.0 if FORMAT == "int8" or FORMAT == "int4" else 1.0

    channel = tl.arange(0, CHANNELS)
    is_channel = channel < WIDTH
    heads_ptr = q_ptr + token[:, None] * q_stride + head[:, None] * q_head_stride + channel[None, :]
    is_q = is_query[:, None] & is_channel[None, :]
    q = tl.load(heads_ptr, mask=is_q, other=0.0)
    if FORMAT == "int4":
        q_high = tl.load(heads_ptr + WIDTH, mask=is_q, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
        if FORMAT == "int4":
            q_high = q_high.to(tl.float32)
    context_len = tl.load(context_lens_ptr + row)
    position = context_len - query_len + query
    last_query = tl.minimum(first_query + TILE_ROWS // GROUP, query_len) - 1
    # Causal: nothing later is visible to this tile. Windowed: nothing earlier, and blocks wholly before may be gone.
    end = tl.minimum(context_len - query_len + last_query + 1, end_chunk * CHUNK)
    begin = 0
    if window is not None:
        begin = tl.maximum(context_len - query_len + first_query - window + 1, 0)
    first_trip = tl.maximum(first_chunk * CHUNK, begin // BLOCK_N * BLOCK_N)

    out = tl.zeros([TILE_ROWS, CHANNELS], tl.float32)
    weight = tl.zeros([TILE_ROWS], tl.float32)
    top = tl.full([TILE_ROWS], NEVER, tl.float32)
    if FORMAT == "int4":
        out_high = tl.zeros([TILE_ROWS, CHANNELS], tl.float32)
    # What a trip needs first is fetched one trip ahead: block ids, and scales, too narrow for asynchronous copies.
    # These need their slots by then, so theirs are worked out a trip ahead too, from block ids fetched yet one earlier.
    # (No value is merely handed on from trip to trip: the compiler would not pipeline such a loop.)
    table_ptr = block_tables_ptr + row * table_stride
    offset = tl.arange(0, BLOCK_N)
    key_position = first_trip + offset
    block = _block_ids(table_ptr, tl.maximum(key_position, begin), end, BLOCK_SIZE)
    if FORMAT != "auto":
        slot = _slots(block, key_position, kv_head, num_kv_heads, BLOCK_SIZE)
        block = _block_ids(table_ptr, key_position + BLOCK_N, end, BLOCK_SIZE)
        is_key = (key_position >= begin) & (key_position < end)
        next_k_scale = tl.load(k_scale_ptr + slot, mask=is_key, other=0.0)
        next_v_scale = tl.load(v_scale_ptr + slot, mask=is_key, other=0.0)
    for chunk in range(first_chunk, end_chunk):
        acc = tl.zeros([TILE_ROWS, CHANNELS], tl.float32)
        total = tl.zeros([TILE_ROWS], tl.float32)
        largest = tl.full([TILE_ROWS], NEVER, tl.float32)
        if FORMAT == "int4":
            acc_high = tl.zeros([TILE_ROWS, CHANNELS], tl.float32)
        for start in range(
            tl.maximum(chunk * CHUNK, first_trip), tl.minimum((chunk + 1) * CHUNK, end), BLOCK_N
        ):
            key_position = start + offset
            is_key = key_position < end
            if window is not None:
                is_key = is_key & (key_position >= begin)
            if FORMAT == "auto":
                slot = _slots(block, key_position, kv_head, num_kv_heads, BLOCK_SIZE)
                block = _block_ids(table_ptr, key_position + BLOCK_N, end, BLOCK_SIZE)
            place = slot[:, None] * WIDTH + channel[None, :]
            is_code = is_key[:, None] & is_channel[None, :]
            k = tl.load(k_cache_ptr + place, mask=is_code, other=0)
            v = tl.load(v_cache_ptr + place, mask=is_code, other=0)
            if FORMAT != "auto":
                slot = _slots(block, key_position + BLOCK_N, kv_head, num_kv_heads, BLOCK_SIZE)
                block = _block_ids(table_ptr, key_position + 2 * BLOCK_N, end, BLOCK_SIZE)
                k_scale = next_k_scale.to(tl.float32) * CODE_UNIT
                v_scale = next_v_scale.to(tl.float32) * (CODE_UNIT * OUT_UNIT)
                is_next = key_position + BLOCK_N < end
                next_k_scale = tl.load(k_scale_ptr + slot, mask=is_next, other=0.0)
                next_v_scale = tl.load(v_scale_ptr + slot, mask=is_next, other=0.0)
            if FORMAT == "int4":
                k_high = decoded(k & 0xF0, FORMAT, q.dtype)
                v_high = decoded(v & 0xF0, FORMAT, q.dtype)
                k = k << 4
                v = v << 4
            k = decoded(k, FORMAT, q.dtype)
            v = decoded(v, FORMAT, q.dtype)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee")
            if FORMAT == "int4":
                logits = tl.dot(q_high, tl.trans(k_high), logits, input_precision="ieee")
            if FORMAT != "auto":
                logits *= k_scale[None, :]
            logits *= logit_factor
            if cap_log2 is not None:
                logits = _capped(logits, cap_log2)
            visible = key_position[None, :] <= position[:, None]
            if window is not None:
                visible = visible & (key_position[None, :] > position[:, None] - window)
            logits = tl.where(visible, logits, NEVER)
            new_largest = tl.maximum(largest, tl.max(logits, 1))
            safe = tl.where(new_largest == NEVER, 0.0, new_largest)
            p = tl.exp2(logits - safe[:, None])
            fade = tl.exp2(largest - safe)
            total = total * fade + tl.sum(p, 1)
            if FORMAT != "auto":
                p *= v_scale[None, :]
            p = p.to(q.dtype)
            acc = acc * fade[:, None] + tl.dot(p, v, input_precision="ieee")
            if FORMAT == "int4":
                acc_high = acc_high * fade[:, None] + tl.dot(p, v_high, input_precision="ieee")
            largest = new_largest
        nonzero = tl.where(total == 0.0, 1.0, total)  # no position of this chunk is visible to the query
        keep, add, weight, top = join(weight, top, largest + tl.log2(nonzero))
        share = (1.0 / (nonzero * OUT_UNIT))[:, None]
        out = add_part(out, keep, acc * share, add)
        if FORMAT == "int4":
            out_high = add_part(out_high, keep, acc_high * share, add)

    if partial >= 0:
        # One chunk: joining it to nothing has left its output and logsumexp as they were.
        partial_row = (partial * num_kv_heads + kv_head) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        tl.store(partial_lse_ptr + partial_row, top, mask=is_query)
        partial_ptr = partial_out_ptr + partial_row[:, None] * HEAD_DIM + channel[None, :]
        tl.store(partial_ptr, out, mask=is_q)
        if FORMAT == "int4":
            tl.store(partial_ptr + WIDTH, out_high, mask=is_q)
    else:
        factor = finish(weight, top, token, head, is_query, sinks_ptr, lse_ptr, lse_stride)[:, None]
        dtype = out_ptr.dtype.element_ty
        row_ptr = out_ptr + token[:, None] * out_stride + head[:, None] * HEAD_DIM + channel[None, :]
        tl.store(row_ptr, (out * factor).to(dtype), mask=is_q)
        if FORMAT == "int4":
            tl.store(row_ptr + WIDTH, (out_high * factor).to(dtype), mask=is_q)

// Paged attention over rows of any length, for a cache of any format. Formulas and shapes: kernels/ops.py.
//
// A work item is some query positions of a row, all query heads of one KV head, and some chunks of its context. Keys and
// values are read a block at a time and then meet all queries of the item: as bfloat16 in the processor's matrix unit,
// where it has one and the queries are bfloat16, else as float32 in vectors. Every query's numbers are worked out in an
// order that depends on positions alone: a logit is a sum over channels in one fixed order; blocks and chunks start at
// multiples of their length. So a query has the same bits alone and in any batch, in a prompt of any cut, and with any
// number of threads.

#define _GNU_SOURCE
#include "amx.h"
#include "floats.h"

// Query positions first_query .. end_query - 1 of a row over some chunks. partial < 0: all chunks, writes the output.
struct item {
    int32_t row, first_query, end_query, first_chunk, end_chunk, partial;
};

static void begin_state(struct state *s, int64_t rows, int64_t vectors) {
    for (int64_t m = 0; m < rows; m++) memset(s->out[m], 0, (size_t)(vectors * LANES) * 4);
    for (int64_t m = 0; m < MAX_ROWS; m++) {
        s->total[m] = 0;
        s->top[m] = -INFINITY;
    }
}


// The softmax over one chunk, a block at a time (Dao, "FlashAttention-2", 2023). Normalised: top is the logsumexp.
static void attend_chunk(const struct attention *a, int64_t row, int64_t kv_head, int64_t chunk, const struct queries *q, struct state *s) {
    int64_t end = min64((chunk + 1) * CHUNK, q->position[q->rows - 1] + 1), begin = chunk * CHUNK;
    float gain = 1;
    if (a->window) begin = max64(begin, q->position[0] + 1 - a->window);
    begin_state(s, q->rows, a->vectors);
    for (int64_t at = begin, stop; at < end; at = stop) {
        stop = min64((at / BLOCK + 1) * BLOCK, end);
        struct ahead ahead = {row, kv_head, stop, min64(stop + BLOCK, end)};
#ifdef HAVE_AMX
        if (a->tiles) {
            gain = has_gain(a->cache_format) ? GAIN_OUT : 1;
            meet_tiles(a, row, kv_head, at, stop, q, &ahead, s);
            continue;
        }
#endif
        meet_floats(a, row, kv_head, at, stop, q, &ahead, s);
    }
    for (int64_t m = 0; m < q->rows; m++) {
        float total = s->total[m] == 0 ? 1 : s->total[m];  // 0: the query sees nothing of this chunk
        scale_row(s->out[m], gain / total, a->vectors);
        s->top[m] += log2f(total);
    }
}

// Joins a chunk's normalised output to what came before, by its logsumexp (Dao et al., "Flash-Decoding", 2023).
static void join(struct state *all, int64_t m, const float *out, float lse, int64_t vectors) {
    float top = lse > all->top[m] ? lse : all->top[m], origin = top == -INFINITY ? 0 : top;
    float keep = exp2_1(all->top[m] - origin), add = exp2_1(lse - origin);
    float *x = all->out[m];
    for (int64_t c = 0; c < vectors; c++)
        store(x + c * LANES, load(x + c * LANES) * keep + load(out + c * LANES) * add);
    all->total[m] = all->total[m] * keep + add;
    all->top[m] = top;
}

static void write_row(const struct attention *a, const struct state *s, int64_t m, int64_t token, int64_t head) {
    float top = s->top[m], keep = 1, total = s->total[m];
    if (a->sinks) {
        float sink = (float)(a->sinks[head] * LOG2_E), origin = top > sink ? top : sink;
        keep = exp2_1(top - origin);
        total = total * keep + exp2_1(sink - origin);
        top = origin;
    }
    if (a->lse) a->lse[token * a->lse_stride + head] = (float)(((double)top + log2((double)total)) * LN_2);
    int64_t at = (token * a->num_q_heads + head) * a->head_dim;
    for (int64_t c = 0; c < a->head_dim; c++) {
        float y = s->out[m][c] * keep / total;
        if (a->q_format == FLOAT32) ((float *)a->out)[at + c] = y;
        else if (a->q_format == BFLOAT16) ((uint16_t *)a->out)[at + c] = to_bf16(y);
        else ((_Float16 *)a->out)[at + c] = (_Float16)y;
    }
}

// ------------------------------------------------------------------------------------------------- work items

// Places of partial results: [partial][query head of the KV head][vectors * LANES + 1], the last is the logsumexp.
static float *partial_of(const struct attention *a, float *partials, int64_t partial, int64_t head, int64_t width) {
    return partials + (partial * a->num_q_heads + head) * width;
}

static void read_queries(const struct attention *a, const struct item *it, int64_t first_head, int64_t heads, struct queries *q) {
    int64_t query_begin = a->query_start[it->row], query_len = a->query_start[it->row + 1] - query_begin;
    int64_t start = a->context_lens[it->row] - query_len, padded = a->vectors * LANES;
    float floats[MAX_ROWS * MAX_DIM], *out = a->tiles ? floats : q->floats;
    q->factor = (float)(a->soft_cap > 0 ? 2 * a->scale / a->soft_cap * LOG2_E : a->scale * LOG2_E);
    q->rows = (it->end_query - it->first_query) * heads;
    memset(out, 0, (size_t)(q->rows * padded) * 4);
    for (int64_t m = 0; m < q->rows; m++) {
        int64_t query = it->first_query + m / heads;
        int64_t at = (query_begin + query) * a->q_stride + (first_head + m % heads) * a->q_head_stride;
        widen_flat(a->q_format, (const uint8_t *)a->q + at * (BITS[a->q_format] / 8), a->head_dim, out + m * padded);
        q->position[m] = (int32_t)(start + query);
    }
    for (int64_t m = q->rows; m < MAX_ROWS; m++) q->position[m] = q->position[q->rows - 1];
#ifdef HAVE_AMX
    if (a->tiles) {
        pair_queries(floats, q->rows, padded, has_gain(a->cache_format) ? GAIN_IN : 1, q->pairs);
        shape_tiles(q->rows);
    }
#endif
}

// The first block that an item reads.
static void fetch_first(const struct attention *a, const struct item *it, int64_t kv_head) {
    int64_t query_len = a->query_start[it->row + 1] - a->query_start[it->row], context_len = a->context_lens[it->row];
    int64_t begin = it->first_chunk * CHUNK;
    if (a->window) begin = max64(begin, context_len - query_len + it->first_query + 1 - a->window);
    struct ahead ahead = {it->row, kv_head, begin, min64((begin / BLOCK + 1) * BLOCK, context_len)};
    while (ahead.at < ahead.end) fetch_some(a, &ahead);
}

static void attend_item(const struct attention *a, const struct item *it, int64_t kv_head, float *partials) {
    struct state part, all;
    struct queries q;
    int64_t padded = a->vectors * LANES;
    for (int64_t head = a->first_head[kv_head]; head < a->first_head[kv_head + 1]; head += MAX_ROWS) {
        int64_t heads = min64(a->first_head[kv_head + 1] - head, MAX_ROWS);
        read_queries(a, it, head, heads, &q);
        begin_state(&all, q.rows, a->vectors);
        for (int64_t chunk = it->first_chunk; chunk < it->end_chunk; chunk++) {
            attend_chunk(a, it->row, kv_head, chunk, &q, &part);
            for (int64_t m = 0; m < q.rows; m++) {
                if (it->partial >= 0) {
                    float *out = partial_of(a, partials, it->partial + m / heads, head + m % heads, padded + 1);
                    memcpy(out, part.out[m], (size_t)padded * 4);
                    out[padded] = part.top[m];
                } else join(&all, m, part.out[m], part.top[m], a->vectors);
            }
        }
        for (int64_t m = 0; m < q.rows && it->partial < 0; m++)
            write_row(a, &all, m, a->query_start[it->row] + it->first_query + m / heads, head + m % heads);
    }
}

static void join_partials(const struct attention *a, const struct item *first, int64_t query, int64_t head, const float *partials) {
    struct state all;
    int64_t width = a->vectors * LANES + 1, num_queries = first->end_query - first->first_query;
    begin_state(&all, 1, a->vectors);
    for (int64_t chunk = 0; chunk < first->end_chunk; chunk++) {
        const float *x = partial_of(a, (float *)partials, first->partial + chunk * num_queries + query, head, width);
        join(&all, 0, x, x[width - 1], a->vectors);
    }
    write_row(a, &all, 0, a->query_start[first->row] + query, head);
}

// The items of all rows into `items`, or only their number if it is null. A row with few queries gets an item a chunk,
// so that one long context keeps all threads busy; `joined` then lists it with its number of chunks in end_chunk.
static int64_t plan(const struct attention *a, struct item *items, struct item *joined, int64_t *num_joined, int64_t *num_partials) {
    int64_t group = 1, count = 0;
    for (int64_t h = 0; h < a->num_kv_heads; h++) group = max64(group, a->first_head[h + 1] - a->first_head[h]);
    int64_t tile = max64(MAX_ROWS / group, 1);
    *num_joined = *num_partials = 0;
    for (int64_t r = 0; r < a->num_rows; r++) {
        int64_t query_len = a->query_start[r + 1] - a->query_start[r], start = a->context_lens[r] - query_len;
        for (int64_t query = 0; query < query_len; query += tile) {
            int64_t end_query = min64(query + tile, query_len);
            int64_t first = a->window ? max64(start + query + 1 - a->window, 0) / CHUNK : 0;
            int64_t end = (start + end_query - 1) / CHUNK + 1;
            struct item it = {(int32_t)r, (int32_t)query, (int32_t)end_query, (int32_t)first, (int32_t)end, -1};
            if (query_len > tile || end - first == 1) {
                if (items) items[count] = it;
                count++;
                continue;
            }
            if (items) joined[*num_joined] = (struct item){it.row, 0, it.end_query, 0, (int32_t)(end - first), (int32_t)*num_partials};
            (*num_joined)++;
            for (int64_t chunk = first; chunk < end; chunk++, count++, *num_partials += query_len)
                if (items) items[count] = (struct item){it.row, 0, it.end_query, (int32_t)chunk, (int32_t)chunk + 1, (int32_t)*num_partials};
        }
    }
    return count;
}

// 0, or 1 where memory ran out.
int paged_attention(const struct attention *arguments) {
    struct attention shaped = *arguments, *a = &shaped;
    int64_t padded = LANES, num_joined, num_partials, threads = a->num_threads;
#ifdef HAVE_AMX
    if ((a->tiles = takes_tiles(a))) padded = 32;
#endif
    a->vectors = (a->head_dim + padded - 1) / padded * padded / LANES;
    int64_t num_items = plan(a, 0, 0, &num_joined, &num_partials);
    size_t item_bytes = (size_t)(num_items + num_joined) * sizeof(struct item);
    size_t partial_bytes = (size_t)(num_partials * a->num_q_heads * (a->vectors * LANES + 1)) * 4;
    struct item *items = malloc(item_bytes);
    float *partials = malloc(partial_bytes + 1);
    if (items && partials) {
        struct item *joined = items + num_items;
        plan(a, items, joined, &num_joined, &num_partials);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < num_items * a->num_kv_heads; i++) {
                int64_t later = i + threads;  // what this thread will probably do next
                if (later < num_items * a->num_kv_heads)
                    fetch_first(a, &items[later / a->num_kv_heads], later % a->num_kv_heads);
                attend_item(a, &items[i / a->num_kv_heads], i % a->num_kv_heads, partials);
            }
#ifdef HAVE_AMX
            if (a->tiles) _tile_release();
#endif
        }
        for (int64_t i = 0; i < num_joined; i++)
            for (int64_t query = 0; query < joined[i].end_query; query++)
                for (int64_t head = 0; head < a->num_q_heads; head++)
                    join_partials(a, &joined[i], query, head, partials);
    }
    int failed = !items || !partials;
    free(items);
    free(partials);
    return failed;
}

// Paged attention over rows of any length, for a cache of any format. Formulas and shapes: kernels/ops.py.
//
// A work item is some query positions of a row and some chunks of its context; a thread takes one of its KV heads, with all
// query heads of that, or, where there are items enough, one after the other. Keys and values are read a block at a time
// and then meet all queries of the item: as bfloat16 in the processor's matrix unit, where it has one and the queries are
// bfloat16, else as float32 in vectors. Every query's numbers are worked out in an order that depends on positions alone:
// a logit is a sum over channels in one fixed order; blocks and chunks start at multiples of their length. So a query has
// the same bits alone and in any batch, in a prompt of any cut, and with any number of threads.

#define _GNU_SOURCE
#include "amx_wide.h"
#include "attention_work.h"
#include "floats.h"
#include "pool.h"

static void begin_state(struct state *s, int64_t rows, int64_t vectors) {
    rows = (rows + 15) / 16 * 16;  // a tile has 16 rows
    memset(s->out, 0, (size_t)(rows * vectors * LANES) * 4);
    for (int64_t m = 0; m < rows; m++) {
        s->total[m] = 0;
        s->top[m] = -INFINITY;
    }
}

// The softmax over one chunk, a block at a time (Dao, "FlashAttention-2", 2023); not yet divided by its total.
static void attend_chunk(const struct attention *a, int64_t row, int64_t kv_head, int64_t chunk, const struct queries *q, const struct ahead *next, struct state *s) {
    int64_t end = min64((chunk + 1) * CHUNK, q->position[q->rows - 1] + 1), begin = chunk * CHUNK;
    if (a->window) begin = max64(begin, q->position[0] + 1 - a->window);
    begin_state(s, q->rows, a->vectors);
    for (int64_t at = begin, stop; at < end; at = stop) {
        stop = min64((at / BLOCK + 1) * BLOCK, end);
        struct ahead ahead = {row, kv_head, stop, min64(stop + BLOCK, end)};
        if (stop == end) ahead = *next;
#ifdef HAVE_AMX
        if (a->tiles) {
            if (q->rows > GROUP) meet_wide(a, row, kv_head, at, stop, q, &ahead, s);
            else meet_tiles(a, row, kv_head, at, stop, q, &ahead, s);
            continue;
        }
#endif
        meet_floats(a, row, kv_head, at, stop, q, &ahead, s);
    }
}

// Joins a chunk's results, rows of `out` of so many floats, to what came before (Dao et al., "Flash-Decoding", 2023). A
// register is read of `total` and `top` for each begun LANES rows.
static void join(struct state *all, const float *out, int64_t stride, const float *total, const float *top, int64_t rows, int64_t vectors) {
    float keep[MAX_ROWS], add[MAX_ROWS];
    for (int64_t m = 0; m < rows; m += LANES) {
        vf old = load(all->top + m), new = load(top + m), highest = larger(new, old);
        vf origin = choose(highest == -INFINITY, (vf){}, highest);
        vf keeps = exp2_of(old - origin), adds = exp2_of(new - origin);
        store(all->total + m, load(all->total + m) * keeps + load(total + m) * adds);
        store(all->top + m, highest);
        store(keep + m, keeps);
        store(add + m, adds);
    }
    for (int64_t m = 0; m < rows; m++)
        for (int64_t c = 0; c < vectors; c++) {
            float *x = all->out + (m * vectors + c) * LANES;
            store(x, load(x) * keep[m] + load(out + m * stride + c * LANES) * add[m]);
        }
}

static void write_row(const struct attention *a, const struct state *s, int64_t m, int64_t token, int64_t head) {
    float top = s->top[m], keep = 1, total = s->total[m], gain = 1;
    if (a->sinks) {
        float sink = (float)(a->sinks[head] * LOG2_E), origin = top > sink ? top : sink;
        keep = exp2_1(top - origin);
        total = total * keep + exp2_1(sink - origin);
        top = origin;
    }
    if (a->lse) a->lse[token * a->lse_stride + head] = (float)(((double)top + log2((double)total)) * LN_2);
    int64_t at = (token * a->num_q_heads + head) * a->head_dim, bytes = BITS[a->q_format] / 8;
    _Alignas(64) float y[MAX_DIM];
    uint8_t rounded[4 * MAX_DIM];
    memcpy(y, s->out + m * a->vectors * LANES, (size_t)(a->vectors * LANES) * 4);
#ifdef HAVE_AMX
    if (a->tiles) {
        order_channels(y, a->vectors);
        gain = has_gain(a->cache_format) ? GAIN_OUT : 1;
    }
#endif
    float factor = keep * gain / total;
    for (int64_t c = 0; c < a->vectors * LANES; c += LANES) {
        vf x = load(y + c) * factor;
        if (a->q_format == FLOAT32) store((float *)rounded + c, x);
        else if (a->q_format == BFLOAT16) store_bf16((uint16_t *)rounded + c, x);
        else store_f16((_Float16 *)rounded + c, x);
    }
    memcpy((uint8_t *)a->out + at * bytes, rounded, (size_t)(a->head_dim * bytes));
}

// Places of partial results: [partial][query head][vectors * LANES + 2]: sums, their total, the logit they are relative to.
static float *partial_of(const struct attention *a, float *partials, int64_t partial, int64_t head) {
    return partials + (partial * a->num_q_heads + head) * (a->vectors * LANES + 2);
}

static void read_queries(const struct attention *a, const struct item *it, int64_t first_head, int64_t heads, struct queries *q) {
    int64_t bytes = BITS[a->q_format] / 8;
    q->factor = (float)(a->soft_cap > 0 ? 2 * a->scale / a->soft_cap * LOG2_E : a->scale * LOG2_E);
    q->rows = queries_of(it) * heads;
    float row[MAX_DIM] = {};
#ifdef HAVE_AMX
    int64_t padded = a->vectors * LANES;
    uint16_t few[GROUP * MAX_DIM], *halves = q->rows <= GROUP ? few : q->halves;
    float gain = has_gain(a->cache_format) ? GAIN_IN : 1;
#endif
    for (int64_t m = 0; m < q->rows; m++) {
        int64_t at = token_of(a, it, m / heads) * a->q_stride + (first_head + m % heads) * a->q_head_stride;
        widen_flat(a->q_format, (const uint8_t *)a->q + at * bytes, a->head_dim, row);
        q->position[m] = (int32_t)position_of(a, it, m / heads);
        for (int64_t c = 0; c < a->head_dim && !a->tiles; c++) q->floats[m * a->head_dim + c] = row[c] * q->factor;
#ifdef HAVE_AMX
        for (int64_t c = 0; c < padded && a->tiles; c += LANES) store_bf16(halves + m * padded + c, load(row + c) * gain);
#endif
    }
    for (int64_t m = q->rows; m % 16; m++) q->position[m] = q->position[q->rows - 1];
#ifdef HAVE_AMX
    if (!a->tiles) return;
    if (q->rows > GROUP) {
        memset(halves + q->rows * padded, 0, (size_t)((-q->rows & (GROUP - 1)) * padded) * 2);
        shape_wide_tiles();
    } else {
        pair_queries(halves, q->rows, padded, q->pairs);
        shape_tiles(q->rows);
    }
#endif
}

// The first block that an item reads of a chunk.
static struct ahead first_block(const struct attention *a, const struct item *it, int64_t kv_head, int64_t chunk) {
    int64_t context_len = a->context_lens[it->row], begin = chunk * CHUNK;
    if (a->window) begin = max64(begin, position_of(a, it, 0) + 1 - a->window);
    return (struct ahead){it->row, kv_head, begin, min64((begin / BLOCK + 1) * BLOCK, context_len)};
}

static void attend_item(const struct attention *a, const struct work *work, const struct item *it, int64_t kv_head, const struct ahead *next, float *partials) {
    struct state part, all;
    struct queries q;
    int64_t padded = a->vectors * LANES, queries = queries_of(it), most = rows_at_once(a) / queries;
    int partial = work->partials[it->row] >= 0;
    for (int64_t head = a->first_head[kv_head]; head < a->first_head[kv_head + 1]; head += most) {
        int64_t heads = min64(a->first_head[kv_head + 1] - head, most);
        read_queries(a, it, head, heads, &q);
        if (!partial) begin_state(&all, q.rows, a->vectors);
        for (int64_t chunk = it->first_chunk; chunk < it->end_chunk; chunk++) {
            struct ahead then = chunk + 1 < it->end_chunk ? first_block(a, it, kv_head, chunk + 1) : *next;
            attend_chunk(a, it->row, kv_head, chunk, &q, &then, &part);
            if (!partial) join(&all, part.out, padded, part.total, part.top, q.rows, a->vectors);
            for (int64_t m = 0; m < q.rows && partial; m++) {
                int64_t shared = it->end_row > it->row + 1, row = it->row + (shared ? m / heads : 0);
                int64_t query = shared ? 0 : m / heads;
                int64_t place = work->partials[row] + (chunk - first_chunk(a, row, 0)) * num_queries(a, row) + query;
                float *out = partial_of(a, partials, place, head + m % heads);
                memcpy(out, part.out + m * padded, (size_t)padded * 4);
                out[padded] = part.total[m];
                out[padded + 1] = part.top[m];
            }
        }
        for (int64_t m = 0; m < q.rows && !partial; m++) write_row(a, &all, m, token_of(a, it, m / heads), head + m % heads);
    }
#ifdef HAVE_AMX
    if (a->tiles) _tile_release();
#endif
}

// One query of a row with partial results.
static void join_partials(const struct attention *a, const struct work *work, int64_t row, int64_t query, float *partials) {
    struct state all;
    int64_t stride = a->vectors * LANES + 2;
    for (int64_t head = 0; head < a->num_q_heads; head += LANES) {
        int64_t heads = min64(a->num_q_heads - head, LANES), place = work->partials[row] + query;
        begin_state(&all, heads, a->vectors);
        for (int64_t chunk = first_chunk(a, row, 0); chunk < end_chunk(a, row, num_queries(a, row) - 1); chunk++) {
            const float *x = partial_of(a, partials, place, head);
            float total[LANES] = {}, top[LANES] = {};
            for (int64_t m = 0; m < heads; m++) {
                total[m] = x[m * stride + stride - 2];
                top[m] = x[m * stride + stride - 1];
            }
            join(&all, x, stride, total, top, heads, a->vectors);
            place += num_queries(a, row);
        }
        for (int64_t m = 0; m < heads; m++) write_row(a, &all, m, a->query_start[row] + query, head + m);
    }
}

struct step {
    const struct attention *a;
    const struct work *work;
    float *partials;
    int64_t span;  // KV heads of an item that one thread takes in turn
};

static void attend_some(const void *context, int64_t i, int64_t thread) {
    const struct step *step = context;
    int64_t heads = step->a->num_kv_heads, end = (i + 1) * step->span;
    for (int64_t at = i * step->span; at < end; at++) {
        int64_t later = at + 1 < end ? at + 1 : end + (step->a->num_threads - 1) * step->span;  // what this thread will probably do next
        struct ahead next = {};
        if (later < step->work->num_items * heads) {
            const struct item *it = &step->work->items[later / heads];
            next = first_block(step->a, it, later % heads, it->first_chunk);
        }
        attend_item(step->a, step->work, &step->work->items[at / heads], at % heads, &next, step->partials);
    }
}

static void join_row(const void *context, int64_t r, int64_t thread) {
    const struct step *step = context;
    for (int64_t query = 0; query < num_queries(step->a, r) && step->work->partials[r] >= 0; query++)
        join_partials(step->a, step->work, r, query, step->partials);
}

// 0, or 1 where memory ran out.
int paged_attention(const struct attention *arguments) {
    struct attention shaped = *arguments, *a = &shaped;
    struct work work = {};
    float *partials = NULL;
    int64_t padded = LANES;
#ifdef HAVE_AMX
    if ((a->tiles = takes_tiles(a))) padded = 32;
#endif
    a->vectors = (a->head_dim + padded - 1) / padded * padded / LANES;
    int failed = plan(a, &work);
    if (!failed && work.num_partials) {
        partials = malloc((size_t)(work.num_partials * a->num_q_heads * (a->vectors * LANES + 2)) * 4);
        failed = !partials;
    }
    // The heads of a block lie side by side, and a processor fetches more of what it reads: one thread should want it.
    int64_t span = work.num_items >= 4 * a->num_threads ? a->num_kv_heads : 1;
    struct step step = {a, &work, partials, span};
    if (!failed) kvshard_share_out(attend_some, &step, work.num_items * a->num_kv_heads / span, a->num_threads);
    if (!failed && work.num_partials) kvshard_share_out(join_row, &step, a->num_rows, a->num_threads);
    free(work.items);
    free(work.partials);
    free(partials);
    return failed;
}

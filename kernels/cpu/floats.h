// Attention over one block in float32 vectors, for any formats.

#pragma once
#include "cache_rows.h"
#include "products.h"

// Turns the products of one row into weights: scales, cap, mask, then 2^(x - top). Returns what fades the older ones.
static float weigh(const struct attention *a, const struct scales *scales, float factor, float *x, int64_t first, int64_t after, struct state *s, int64_t m) {
    vf highest = splat(-INFINITY), total = {};
    vi place = lanes();
    for (int64_t j = 0; j < BLOCK; j += LANES, place += LANES) {
        vf logits = load(x + j) * factor;
        if (a->k_scale) logits *= load(scales->k + j);
        if (a->soft_cap > 0) {  // the factor has 2 / cap in it: cap tanh(y) = cap - 2 cap / (exp(2 y) + 1)
            float cap = (float)(a->soft_cap * LOG2_E);
            logits = cap - 2 * cap / (exp2_of(logits) + 1.0f);
        }
        logits = choose((place >= (int32_t)first) & (place < (int32_t)after), logits, splat(-INFINITY));
        highest = larger(logits, highest);
        store(x + j, logits);
    }
    float block_top = max_of(highest), top = block_top > s->top[m] ? block_top : s->top[m];
    float origin = top == -INFINITY ? 0 : top;  // nothing is visible yet: -inf - -inf would be NaN
    for (int64_t j = 0; j < BLOCK; j += LANES) {
        vf weights = exp2_of(load(x + j) - origin);
        total += weights;
        store(x + j, a->v_scale ? weights * load(scales->v + j) : weights);
    }
    float fade = exp2_1(s->top[m] - origin);
    s->total[m] = s->total[m] * fade + sum_of(total);
    s->top[m] = top;
    return fade;
}

static void weigh_rows(const struct attention *a, const struct queries *q, const struct scales *scales, int64_t begin, int64_t end, float *p, float *fade, struct state *s) {
    int64_t start = begin / BLOCK * BLOCK;
    for (int64_t m = 0; m < q->rows; m++) {
        int64_t first = a->window ? max64(q->position[m] + 1 - a->window - start, 0) : 0;
        int64_t after = min64(q->position[m] + 1, end) - start;
        fade[m] = weigh(a, scales, q->factor, p + m * BLOCK, first, after, s, m);
    }
}

// Queries meet the keys and values of positions begin .. end - 1, all in one block.
static void meet_floats(const struct attention *a, int64_t row, int64_t kv_head, int64_t begin, int64_t end, const struct queries *q, struct ahead *ahead, struct state *s) {
    float p[SOME_ROWS * BLOCK], fade[SOME_ROWS];
    struct floats b;
    struct scales scales;
    if (a->k_scale) read_scales(a, row, kv_head, begin, end, 1, 1, &scales);
    fetch_some(a, ahead);
    read_floats(a, row, kv_head, begin, end, a->vectors * LANES, &b);
    fetch_some(a, ahead);
    logits(q->floats, b.k, q->rows, a->vectors, p);
    fetch_some(a, ahead);
    weigh_rows(a, q, &scales, begin, end, p, fade, s);
    for (int64_t m = 0; m < q->rows; m++)
        if (fade[m] != 1) scale_row(s->out + m * a->vectors * LANES, fade[m], a->vectors);
    fetch_some(a, ahead);
    add_values(s->out, p, b.v, q->rows, a->vectors);
}


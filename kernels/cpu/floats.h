// Attention over one block in float32 vectors, for any formats.

#pragma once
#include "products.h"
#include "turned_keys.h"

// The logits of a row from its products: scales, cap, mask. Returns the largest.
static inline float logits_of(const struct attention *a, const struct scales *scales, float *x, int64_t first, int64_t after) {
    vf highest = splat(-INFINITY);
    vi place = lanes();
    int hides = first > 0 || after < BLOCK;
    for (int64_t j = 0; j < BLOCK; j += LANES, place += LANES) {
        vf logits = load(x + j);
        if (hides || a->k_scale || a->soft_cap > 0) {
            if (a->k_scale) logits *= load(scales->k + j);
            if (a->soft_cap > 0) {  // the queries have 2 / cap in them: cap tanh(y) = cap - 2 cap / (exp(2 y) + 1)
                float cap = (float)(a->soft_cap * LOG2_E);
                logits = cap - 2 * cap / (exp2_of(logits) + 1.0f);
            }
            if (hides) logits = choose((place >= (int32_t)first) & (place < (int32_t)after), logits, splat(-INFINITY));
            store(x + j, logits);
        }
        highest = larger(logits, highest);
    }
    return max_of(highest);
}

// The weights of a row from its logits: 2^(x - origin). Returns their sum.
static inline float weights_of(const struct attention *a, const struct scales *scales, float *x, float origin) {
    vf total = {};
    for (int64_t j = 0; j < BLOCK; j += LANES) {
        vf weights = weight_of(load(x + j) - origin);
        total += weights;
        store(x + j, a->v_scale ? weights * load(scales->v + j) : weights);
    }
    return sum_of(total);
}

// Turns products into weights. fade[m] is what fades older weights of row m.
static void weigh_rows(const struct attention *a, const struct queries *q, const struct scales *scales, int64_t begin, int64_t end, float *p, float *fade, struct state *s) {
    int64_t start = begin / BLOCK * BLOCK;
    for (int64_t m = 0; m < q->rows; m += LANES) {
        int64_t count = min64(q->rows - m, LANES);
        float tops[LANES], totals[LANES] = {};
        store(tops, splat(-INFINITY));
        for (int64_t i = 0; i < count; i++) {
            int64_t first = a->window ? max64(q->position[m + i] + 1 - a->window - start, 0) : 0;
            int64_t after = min64(q->position[m + i] + 1, end) - start;
            tops[i] = logits_of(a, scales, p + (m + i) * BLOCK, first, after);
        }
        vf before = load(s->top + m), top = larger(load(tops), before);
        vf origin = choose(top == -INFINITY, (vf){}, top);  // nothing is visible yet: -inf - -inf would be NaN
        vf fades = weight_of(before - origin);
        for (int64_t i = 0; i < count; i++) totals[i] = weights_of(a, scales, p + (m + i) * BLOCK, origin[i]);
        store(s->total + m, load(s->total + m) * fades + load(totals));
        store(s->top + m, top);
        store(fade + m, fades);
    }
}

// Queries meet the keys and values of positions begin .. end - 1, all in one block.
static void meet_floats(const struct attention *a, int64_t row, int64_t kv_head, int64_t begin, int64_t end, const struct queries *q, struct ahead *ahead, struct state *s) {
    _Alignas(64) float k[MAX_DIM * BLOCK], v[BLOCK * MAX_DIM], p[FLOAT_ROWS * BLOCK];
    float fade[FLOAT_ROWS];
    struct scales scales;
    int64_t padded = a->vectors * LANES;
    if (a->k_scale) read_scales(a, row, kv_head, begin, end, 1, 1, &scales);
    fetch_some(a, ahead);
    read_keys(a, row, kv_head, begin, end, k);
    fetch_some(a, ahead);
    memset(p, 0, (size_t)(q->rows * BLOCK) * 4);
    add_products(p, q->floats, q->rows, a->head_dim, k, BLOCK);
    weigh_rows(a, q, &scales, begin, end, p, fade, s);
    fetch_some(a, ahead);
    for (int64_t m = 0; m < q->rows; m++)
        if (fade[m] != 1) scale_row(s->out + m * padded, fade[m], a->vectors);
    read_values(a, row, kv_head, begin, end, padded, v);
    fetch_some(a, ahead);
    add_products(s->out, p, q->rows, BLOCK, v, padded);
}

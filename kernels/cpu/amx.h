// Attention over one block on the matrix unit of Intel processors (AMX): bfloat16 in, float32 sums; up to 16 queries.
//
// A tile is a register of up to 16 rows of 64 bytes. A product of tiles adds A[M][32] . B[32][N] to C[M][N], where the
// values of B lie in pairs: B's row i holds, for every column, its values 2i and 2i + 1. Keys are A as they are stored
// and queries are B, so logits come out as [key][query] and softmax has a lane per query; then weights, transposed, are A,
// and values are B once each two rows of them have been interleaved. Each sum depends on its own row and column alone and
// is taken in one order, so a query has the same bits in any company; amx_wide.h does the same for more queries.
// Instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.

#pragma once
#include "amx_rows.h"

#ifdef HAVE_AMX
// Queries that go through a product together: columns of a tile.
static inline int64_t columns_of(int64_t rows) { return rows <= 4 ? 4 : 16; }

// Tiles 0 to 3: products of 16 keys each; 4: queries; 5: keys or values; 6: outputs; 7: weights.
static void shape_tiles(int64_t num_queries) {
    int64_t columns = columns_of(num_queries);
    struct tile_shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = (uint16_t)(i < 5 ? 4 * columns : 64);
        shapes.rows[i] = (uint8_t)(i < 6 ? 16 : columns);
    }
    load_shapes(&shapes);
}

// Queries, [rows][padded], as pairs of channels: [padded / 2][columns].
static void pair_queries(const uint16_t *q, int64_t rows, int64_t padded, uint32_t *out) {
    int64_t columns = columns_of(rows);
    for (int64_t i = 0; i < padded / 2; i++)
        for (int64_t m = 0; m < columns; m++) {
            uint32_t pair = 0;
            if (m < rows) memcpy(&pair, q + m * padded + 2 * i, 4);
            *out++ = pair;
        }
}

// x[j][m] = k[j] . q[m] for a block's keys.
static void products(const uint32_t *q, const uint16_t *const *keys, int64_t columns, int64_t padded, float *x) {
    size_t stride = (size_t)columns * 4;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < padded; c += 32) {
        _tile_loadd(4, q + c / 2 * columns, stride);
#define PRODUCT(I)                                          \
    _tile_loadd(5, keys[I] + c, (size_t)padded * 2);        \
    _tile_dpbf16ps(I, 5, 4);
        PRODUCT(0) PRODUCT(1) PRODUCT(2) PRODUCT(3)
#undef PRODUCT
    }
    _tile_stored(0, x, stride);
    _tile_stored(1, x + 16 * columns, stride);
    _tile_stored(2, x + 32 * columns, stride);
    _tile_stored(3, x + 48 * columns, stride);
}

// x * gain - origin, rounded once.
static inline vf above(vf x, vf gain, vf origin) { return (vf)_mm512_fmsub_ps((__m512)x, (__m512)gain, (__m512)origin); }

// Whether some key of the block from `start` on is hidden from some query at `first` to `last`.
static inline int some_hidden(const struct attention *a, int64_t start, int64_t first, int64_t last) {
    return start + BLOCK - 1 > first || (a->window && start <= last - a->window);
}

// The logits of a register of products, over `gain`: scales, cap and mask. `place` has its keys' positions.
static inline __attribute__((always_inline)) vf logits_over(
    const struct attention *a, vf x, vf k_scale, float factor, int hides, vi place, vi position, vi oldest
) {
    if (a->k_scale) x *= k_scale;
    if (a->soft_cap > 0) {  // see `weigh` in floats.h
        float cap = (float)(a->soft_cap * LOG2_E);
        x = cap - 2 * cap / (exp2_of(x * factor) + 1.0f);
    }
    return hides ? choose((place >= oldest) & (place <= position), x, splat(-INFINITY)) : x;
}

// Turns products, [BLOCK][n], into weights, 2^(logit - top). A lane is a query, and where n is 4, a register has four
// keys. fade[m] is what fades older weights of query m. The sum of weights is a tree over 16 sums of every 16th key each.
static inline __attribute__((always_inline)) void weigh_columns(
    const struct attention *a, const struct queries *q, const struct scales *scales, int64_t begin, int n, float *x, float *fade, struct state *s
) {
    int keys = LANES / n;  // in a register
    vi query = lanes() & (n - 1), key = lanes() / n;
    vi position = __builtin_shuffle(load_integers(q->position), query);
    vi oldest = a->window ? position + 1 - (int32_t)a->window : (vi){};
    int64_t start = begin / BLOCK * BLOCK;
    int hides = some_hidden(a, start, q->position[0], q->position[q->rows - 1]);
    int changes = hides || a->k_scale || a->soft_cap > 0;
    vf highest = splat(-INFINITY), gain = splat(a->soft_cap > 0 ? 1 : q->factor);
    for (int i = 0; i < BLOCK / keys; i++) {
        vf logits = load(x + i * LANES);
        if (changes) {
            vf k_scale = a->k_scale ? __builtin_shuffle(load(scales->k + i * keys), key) : (vf){};
            logits = logits_over(a, logits, k_scale, q->factor, hides, key + (int32_t)(start + i * keys), position, oldest);
            store(x + i * LANES, logits);
        }
        highest = larger(logits, highest);
    }
    for (int w = n; w < LANES; w *= 2) highest = larger(highest, __builtin_shuffle(highest, lanes() ^ w));
    vf before = __builtin_shuffle(load(s->top), query), top = larger(highest * gain, before);
    vf origin = choose(top == -INFINITY, (vf){}, top);  // nothing is visible yet: -inf - -inf would be NaN
    vf total[16] = {};
    for (int first = 0; first < BLOCK / keys; first += n)
        for (int i = 0; i < n; i++) {
            vf weights = weight_of(above(load(x + (first + i) * LANES), gain, origin));
            total[i] += weights;
            store(x + (first + i) * LANES, weights);
        }
    for (int i = 0; i < n; i++)
        for (int w = n; w < LANES; w *= 2) total[i] += __builtin_shuffle(total[i], lanes() ^ w);
    for (int step = 1; step < n; step *= 2)
        for (int i = 0; i < n; i += 2 * step) total[i] += total[i + step];
    vf fades = weight_of(before - origin);
    store(s->total, __builtin_shuffle(load(s->total), query) * fades + total[0]);
    store(s->top, top);
    store(fade, fades);
}

// Splits pairs until `n` vectors that hold n queries in turn hold one query each.
static inline __attribute__((always_inline)) void part_queries(vf *x, int n) {
    vi even;
    for (int i = 0; i < LANES; i++) even[i] = 2 * i;
    vf y[16];
    for (int step = 1; step < n; step *= 2) {
        for (int i = 0; i < n / 2; i++) {
            y[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], even);
            y[n / 2 + i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], even + 1);
        }
        for (int i = 0; i < n; i++) x[i] = y[i];
    }
}

// Weights, [BLOCK][n], as rows of bfloat16: [n][BLOCK].
static inline __attribute__((always_inline)) void turn_weights(const float *x, const float *v_scale, int n, uint16_t *out) {
    for (int64_t j = 0; j < BLOCK; j += 2 * LANES) {
        vf parts[2][16];
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < n; i++) parts[half][i] = load(x + (j + half * LANES) * n + i * LANES);
            part_queries(parts[half], n);
            for (int i = 0; i < n && v_scale; i++) parts[half][i] *= load(v_scale + j + half * LANES);
        }
        for (int i = 0; i < n; i++)
            _mm512_storeu_si512(out + i * BLOCK + j, (__m512i)_mm512_cvtne2ps_pbh((__m512)parts[1][i], (__m512)parts[0][i]));
    }
}

// out[m] = fade[m] out[m], for the queries of one group.
static inline void fade_rows(float *out, const float *fade, int64_t rows, int64_t padded) {
    for (int64_t m = 0; m < rows; m++)
        if (fade[m] != 1) scale_row(out + m * padded, fade[m], padded / LANES);
}

// Channels of a row of outputs, whose values read_block_of has interleaved, in their order.
static void order_channels(float *out, int64_t vectors) {
    vi lower = (lanes() >> 3) * 4 + (lanes() & 3) + (lanes() & 4) * 4, upper = lower + 8;
    for (int64_t c = 0; c < vectors * LANES; c += 2 * LANES) {
        vf x = load(out + c), y = load(out + c + LANES);
        store(out + c, __builtin_shuffle(x, y, lower));
        store(out + c + LANES, __builtin_shuffle(x, y, upper));
    }
}

// Up to 16 queries meet the keys and values of positions begin .. end - 1, all in one block.
static void meet_tiles(const struct attention *a, int64_t row, int64_t kv_head, int64_t begin, int64_t end, const struct queries *q, struct ahead *ahead, struct state *s) {
    struct halves b;
    struct scales scales;
    _Alignas(64) float x[BLOCK * 16], fade[16];
    _Alignas(64) uint16_t weights[16 * BLOCK];
    int64_t padded = a->vectors * LANES, columns = columns_of(q->rows);
    read_block(a, row, kv_head, begin, end, ahead, &b, &scales);
    fetch_some(a, ahead);
    const float *v_scale = a->k_scale ? scales.v : NULL;
    settle(b.k);
    products(q->pairs, b.keys, columns, padded, x);
    fetch_some(a, ahead);
    if (columns == 4) {
        weigh_columns(a, q, &scales, begin, 4, x, fade, s);
        turn_weights(x, v_scale, 4, weights);
    } else {
        weigh_columns(a, q, &scales, begin, 16, x, fade, s);
        turn_weights(x, v_scale, 16, weights);
    }
    fetch_some(a, ahead);
    fade_rows(s->out, fade, q->rows, padded);
    settle(weights);
    for (int64_t c = 0; c < padded; c += 16) {
        _tile_loadd(6, s->out + c, (size_t)padded * 4);
        for (int64_t j = 0; j < BLOCK; j += 32) {
            _tile_loadd(7, weights + j, BLOCK * 2);
            _tile_loadd(5, b.v + j * padded + 2 * c, (size_t)padded * 4);
            _tile_dpbf16ps(6, 7, 5);
        }
        _tile_stored(6, s->out + c, (size_t)padded * 4);
    }
}
#endif

// Attention over one block on the matrix unit of Intel processors (AMX): bfloat16 in, float32 sums.
//
// A tile is a register of up to 16 rows of 64 bytes. A product of tiles adds A[M][32] . B[32][N] to C[M][N], where the
// values of B lie in pairs: B's row i holds, for every column, its values 2i and 2i + 1. Keys are A as they are stored
// and queries are B, so logits come out as [key][query] and softmax has a lane per query; then weights, transposed, are A,
// and values are B once each two rows of them have been interleaved. Each sum depends on its own row and column alone and
// is taken in one order, so a query has the same bits in any company.
// Instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.

#pragma once
#include "amx_rows.h"

#ifdef HAVE_AMX
// Queries that go through a product together: columns of a tile.
static inline int64_t columns_of(int64_t rows) { return rows <= 4 ? 4 : 16; }

// Tiles 0 to 3: products of 16 keys each; 4: queries; 5: keys or values; 6: outputs; 7: weights.
static void shape_tiles(int64_t num_queries) {
    int64_t columns = columns_of(num_queries);
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = (uint16_t)(i < 5 ? 4 * columns : 64);
        shapes.rows[i] = (uint8_t)(i < 6 ? 16 : columns);
    }
    _tile_loadconfig(&shapes);
}

// Queries, [rows][padded], as pairs of channels: [rows / columns, upwards][padded / 2][columns].
static void pair_queries(const float *q, int64_t rows, int64_t padded, float gain, uint32_t *out) {
    int64_t columns = columns_of(rows);
    for (int64_t first = 0; first < rows; first += columns)
        for (int64_t i = 0; i < padded / 2; i++)
            for (int64_t m = first; m < first + columns; m++) {
                const float *x = q + m * padded + 2 * i;
                *out++ = m < rows ? (uint32_t)to_bf16(x[1] * gain) << 16 | to_bf16(x[0] * gain) : 0;
            }
}

// x[j][m] = k[j] . q[m] for a block's keys and one group of queries.
static void group_products(const uint32_t *q, const uint16_t *const *keys, int64_t columns, int64_t padded, float *x) {
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

// Turns the products of one group, [BLOCK][n], into weights: scales, cap, mask, then 2^(x - top). A lane is a query, and
// where n is 4, a register has four keys. fade[m] is what fades older weights of query m. The sums of weights are those
// of every fourth key, then joined, for any n: a query's bits do not depend on its group.
static inline __attribute__((always_inline)) void weigh_group(
    const struct attention *a, const struct queries *q, const struct scales *scales, int64_t begin, int64_t m, int n,
    float *x, float *fade, struct state *s
) {
    enum { SUMS = 4 };
    int keys = LANES / n;  // in a register
    vi query = lanes() & (n - 1), key = lanes() / n;
    vi position = __builtin_shuffle(load_integers(q->position + m), query);
    int64_t start = begin / BLOCK * BLOCK, last = q->position[q->rows - 1];
    int hides = start + BLOCK - 1 > q->position[0] || (a->window && start <= last - a->window);
    vi oldest = a->window ? position + 1 - (int32_t)a->window : (vi){};
    float factor = q->factor;
    vf highest = splat(-INFINITY), cap = splat((float)(a->soft_cap * LOG2_E));
    for (int i = 0; i < BLOCK / keys; i++) {
        vf logits = load(x + i * LANES) * factor;
        if (a->k_scale) logits *= __builtin_shuffle(load(scales->k + i * keys), key);
        if (a->soft_cap > 0) logits = cap - 2 * cap / (exp2_of(logits) + 1.0f);  // see `weigh` in floats.h
        if (hides) {
            vi place = key + (int32_t)(start + i * keys);
            logits = choose((place >= oldest) & (place <= position), logits, splat(-INFINITY));
        }
        highest = larger(logits, highest);
        store(x + i * LANES, logits);
    }
    for (int w = n; w < LANES; w *= 2) highest = larger(highest, __builtin_shuffle(highest, lanes() ^ w));
    vf before = __builtin_shuffle(load(s->top + m), query), top = larger(highest, before);
    vf origin = choose(top == -INFINITY, (vf){}, top);  // nothing is visible yet: -inf - -inf would be NaN
    vf total[SUMS] = {};
    for (int i = 0; i < BLOCK / keys; i += SUMS / keys)
        for (int sum = 0; sum < SUMS / keys; sum++) {
            vf weights = exp2_of(load(x + (i + sum) * LANES) - origin);
            total[sum] += weights;
            store(x + (i + sum) * LANES, weights);
        }
    if (n == LANES) total[0] = (total[0] + total[1]) + (total[2] + total[3]);
    for (int w = n; w < LANES; w *= 2) total[0] += __builtin_shuffle(total[0], lanes() ^ w);
    vf fades = exp2_of(before - origin);
    store(s->total + m, __builtin_shuffle(load(s->total + m), query) * fades + total[0]);
    store(s->top + m, top);
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

// out[m] = fade[m] out[m] + sum over the block's positions of weights[m][j] * v[j], for one group of queries.
static void group_values(float *out, const float *fade, const uint16_t *weights, const uint16_t *v, int64_t rows, int64_t padded) {
    _Alignas(64) float sums[16 * MAX_DIM];
    vi lower = (lanes() >> 3) * 4 + (lanes() & 3) + (lanes() & 4) * 4, upper = lower + 8;  // see read_block_of
    for (int64_t c = 0; c < padded; c += 16) {
        _tile_zero(6);
        for (int64_t j = 0; j < BLOCK; j += 32) {
            _tile_loadd(7, weights + j, BLOCK * 2);
            _tile_loadd(5, v + j * padded + 2 * c, (size_t)padded * 4);
            _tile_dpbf16ps(6, 7, 5);
        }
        _tile_stored(6, sums + c, (size_t)padded * 4);
    }
    for (int64_t m = 0; m < rows; m++)
        for (int64_t c = 0; c < padded; c += 32) {
            float *at = out + m * MAX_DIM + c;
            vf x = load(sums + m * padded + c), y = load(sums + m * padded + c + 16);
            store(at, load(at) * fade[m] + __builtin_shuffle(x, y, lower));
            store(at + 16, load(at + 16) * fade[m] + __builtin_shuffle(x, y, upper));
        }
}

// Queries meet the keys and values of positions begin .. end - 1, all in one block.
static void meet_tiles(const struct attention *a, int64_t row, int64_t kv_head, int64_t begin, int64_t end, const struct queries *q, struct ahead *ahead, struct state *s) {
    struct halves b;
    struct scales scales;
    _Alignas(64) float x[BLOCK * 16], fade[16];
    _Alignas(64) uint16_t weights[16 * BLOCK];
    int64_t padded = a->vectors * LANES, columns = columns_of(q->rows);
    int small = has_gain(a->cache_format);
    if (a->k_scale) read_scales(a, row, kv_head, begin, end, small ? GAIN_OUT : 1, small ? GAIN_IN : 1, &scales);
    fetch_some(a, ahead);
    read_halves(a, row, kv_head, begin, end, &b);
    fetch_some(a, ahead);
    const float *v_scale = a->k_scale ? scales.v : NULL;
    for (int64_t m = 0; m < q->rows; m += columns) {
        group_products(q->pairs + m * padded / 2, b.keys, columns, padded, x);
        fetch_some(a, ahead);
        if (columns == 4) {
            weigh_group(a, q, &scales, begin, m, 4, x, fade, s);
            turn_weights(x, v_scale, 4, weights);
        } else {
            weigh_group(a, q, &scales, begin, m, 16, x, fade, s);
            turn_weights(x, v_scale, 16, weights);
        }
        fetch_some(a, ahead);
        group_values(s->out[m], fade, weights, b.v, min64(q->rows - m, columns), padded);
    }
}
#endif

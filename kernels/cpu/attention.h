// What the parts of paged attention hand each other.

#pragma once
#include <math.h>
#include <stdlib.h>

#include "vectors.h"

// Positions are read by the block, which is 64 whatever the cache's own block size, and summed up by the chunk.
// Query rows of an item: at most, in vectors and on the matrix unit, as they share the reading of a block; and so few that
// one is not cut smaller to keep threads busy.
enum { BLOCK = 64, CHUNK = 512, MAX_DIM = 256, FLOAT_ROWS = 64, MAX_ROWS = 128, FEW_ROWS = 32 };

struct attention {
    const void *q, *k, *v;             // k, v: [num_blocks, num_kv_heads, block_size, width]
    const _Float16 *k_scale, *v_scale;  // [num_blocks, num_kv_heads, block_size] or null
    void *out;                          // [num_tokens, num_q_heads, head_dim]
    float *lse;                         // [num_tokens, num_q_heads] or null
    const float *sinks;                 // [num_q_heads] or null
    const int32_t *query_start, *context_lens, *block_tables, *first_head;  // [R + 1], [R], [R][..], [Hk + 1]
    int64_t num_rows, num_q_heads, num_kv_heads, head_dim, block_size, table_stride;
    int64_t q_stride, q_head_stride, lse_stride;
    int64_t q_format, cache_format, window;  // window 0: all positions
    int64_t num_threads;
    double scale, soft_cap;  // soft_cap 0: none
    int64_t tiles, vectors;  // worked out here: whether the matrix unit is used; registers of a row of floats
};

// The queries of an item, as the products want them.
struct queries {
    _Alignas(64) union {
        float floats[FLOAT_ROWS * MAX_DIM];  // [rows][channels]
        uint32_t pairs[16 * MAX_DIM / 2];    // [channels / 2][4 or 16 rows][2], see amx.h
        uint16_t halves[MAX_ROWS * MAX_DIM];  // [rows][channels], see amx_wide.h
    };
    float factor;  // from products to logits; `floats` have it in them
    int64_t rows;
    int32_t position[MAX_ROWS];  // of several queries of one row in their order; places beyond the last query repeat it
};

// What query heads have seen so far: sum of weights * values, sum of weights, and the logit that weights are relative to.
// Logits are in base 2: exp(x) = 2^(x log2 e).
struct state {
    _Alignas(64) float out[MAX_ROWS * MAX_DIM];  // [rows][vectors * LANES], channels in the order of the products
    float total[MAX_ROWS], top[MAX_ROWS];
};

static inline int64_t rows_at_once(const struct attention *a) { return a->tiles ? MAX_ROWS : FLOAT_ROWS; }

static const double LOG2_E = 1.4426950408889634074, LN_2 = 0.69314718055994530942;

#if defined(__AVX512DQ__)
// 2^x to 2 units in the last place for x <= 0, of fewer instructions than exp2_of: x's fraction in [0, 1) goes through a
// polynomial that is exact at 0, and the scaling takes x's whole part by itself. Also right for -inf and NaN.
static inline vf weight_of(vf x) {
    enum { FRACTION = 9 };  // what is left over the next lower integer; no exceptions
    vf f = (vf)_mm512_reduce_ps((__m512)x, FRACTION), p = splat(1.867130165919661522e-3f);
    p = p * f + 9.017029777169227600e-3f;
    p = p * f + 5.579991266131401062e-2f;
    p = p * f + 2.401644438505172729e-1f;
    p = p * f + 6.931512951850891113e-1f;
    p = p * f + 1.0f;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
}
#else
static inline vf weight_of(vf x) { return exp2_of(x); }
#endif

static inline float exp2_1(float x) { return exp2_of(splat(x))[0]; }
static inline void scale_row(float *x, float factor, int64_t vectors) {
    for (int64_t c = 0; c < vectors; c++) store(x + c * LANES, load(x + c * LANES) * factor);
}

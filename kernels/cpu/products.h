// The two matrix products of attention over one block of positions, for a few query rows.

#pragma once
#include "attention.h"

// logits[m][j] = q[m] . k[j] for the block's keys; DV registers a row.
#define DEFINE_LOGITS(NAME, DV)                                                                    \
    static void NAME(const float *q, const float *k, int64_t rows, int64_t vectors, float *out) {  \
        (void)vectors;                                                                             \
        for (int64_t m = 0; m < rows; m++)                                                         \
            for (int64_t j = 0; j < BLOCK; j += LANES) {                                           \
                vf sums[LANES] = {};                                                               \
                for (int64_t c = 0; c < DV; c++) {                                                 \
                    vf query = load(q + (m * DV + c) * LANES);                                     \
                    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)                       \
                        sums[i] += query * load(k + ((j + i) * DV + c) * LANES);                   \
                }                                                                                  \
                store(out + m * BLOCK + j, fold(sums));                                            \
            }                                                                                      \
    }
DEFINE_LOGITS(logits_any, vectors)
DEFINE_LOGITS(logits_4, 4)
DEFINE_LOGITS(logits_8, 8)

static void logits(const float *q, const float *k, int64_t rows, int64_t vectors, float *out) {
    if (vectors == 4) logits_4(q, k, rows, vectors, out);
    else if (vectors == 8) logits_8(q, k, rows, vectors, out);
    else logits_any(q, k, rows, vectors, out);
}

// out[m] += sum over the block's positions of p[m][j] * v[j], position by position; R rows at once, DV registers each.
#define DEFINE_VALUES(NAME, R, DV)                                                                 \
    static void NAME(float *out, const float *p, const float *v, int64_t stride, int64_t step) {   \
        vf sums[R][DV];                                                                            \
        for (int m = 0; m < R; m++)                                                                \
            for (int c = 0; c < DV; c++) sums[m][c] = load(out + m * stride + c * LANES);         \
        for (int64_t j = 0; j < BLOCK; j++)                                                        \
            _Pragma("GCC unroll 8") for (int c = 0; c < DV; c++) {                                 \
                vf value = load(v + j * stride + c * LANES);                                       \
                _Pragma("GCC unroll 8") for (int m = 0; m < R; m++)                                \
                    sums[m][c] += splat(p[m * step + j]) * value;                                  \
            }                                                                                      \
        for (int m = 0; m < R; m++)                                                                \
            for (int c = 0; c < DV; c++) store(out + m * stride + c * LANES, sums[m][c]);         \
    }
DEFINE_VALUES(values_4x4, 4, 4)
DEFINE_VALUES(values_3x4, 3, 4)
DEFINE_VALUES(values_2x4, 2, 4)
DEFINE_VALUES(values_1x4, 1, 4)
DEFINE_VALUES(values_4x1, 4, 1)
DEFINE_VALUES(values_1x1, 1, 1)

// For all rows: out is [rows][vectors * LANES], p is [rows][BLOCK].
static void add_values(float *out, const float *p, const float *v, int64_t rows, int64_t vectors) {
    int64_t stride = vectors * LANES;
    for (int64_t m = 0; m < rows;) {
        int64_t left = rows - m, c = 0;
        const float *weights = p + m * BLOCK;
        for (; c + 4 <= vectors; c += 4) {
            float *at = out + m * stride + c * LANES;
            if (left >= 4) values_4x4(at, weights, v + c * LANES, stride, BLOCK);
            else if (left == 3) values_3x4(at, weights, v + c * LANES, stride, BLOCK);
            else if (left == 2) values_2x4(at, weights, v + c * LANES, stride, BLOCK);
            else values_1x4(at, weights, v + c * LANES, stride, BLOCK);
        }
        int64_t done = min64(left, 4);
        for (; c < vectors; c++) {
            if (left >= 4) values_4x1(out + m * stride + c * LANES, weights, v + c * LANES, stride, BLOCK);
            else
                for (int64_t i = 0; i < done; i++)
                    values_1x1(out + (m + i) * stride + c * LANES, weights + i * BLOCK, v + c * LANES, stride, BLOCK);
        }
        m += done;
    }
}


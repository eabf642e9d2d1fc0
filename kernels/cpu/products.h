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
    static void NAME(float *out, const float *p, const float *v, int64_t stride) {                 \
        vf sums[R][DV], weights[R];                                                                \
        for (int m = 0; m < R; m++)                                                                \
            for (int c = 0; c < DV; c++) sums[m][c] = load(out + m * stride + c * LANES);          \
        for (int64_t j = 0; j < BLOCK; j++) {                                                      \
            _Pragma("GCC unroll 3") for (int m = 0; m < R; m++)                                    \
                weights[m] = kept(splat(p[m * BLOCK + j]));                                        \
            _Pragma("GCC unroll 4") for (int c = 0; c < DV; c++) {                                 \
                vf value = kept(load(v + j * stride + c * LANES));                                 \
                _Pragma("GCC unroll 3") for (int m = 0; m < R; m++)                                \
                    sums[m][c] += weights[m] * value;                                              \
            }                                                                                      \
        }                                                                                          \
        for (int m = 0; m < R; m++)                                                                \
            for (int c = 0; c < DV; c++) store(out + m * stride + c * LANES, sums[m][c]);          \
    }
DEFINE_VALUES(values_3x4, 3, 4)
DEFINE_VALUES(values_2x4, 2, 4)
DEFINE_VALUES(values_1x4, 1, 4)
DEFINE_VALUES(values_3x1, 3, 1)
DEFINE_VALUES(values_2x1, 2, 1)
DEFINE_VALUES(values_1x1, 1, 1)

// For all rows: out is [rows][vectors * LANES], p is [rows][BLOCK]. Twelve sums, three weights and a value are 16 registers. The
// last four rows are two and two: the few sums of one row alone would wait for each other.
static void add_values(float *out, const float *p, const float *v, int64_t rows, int64_t vectors) {
    int64_t stride = vectors * LANES;
    for (int64_t left = rows, now, c; left; left -= now, out += now * stride, p += now * BLOCK) {
        now = left == 4 ? 2 : min64(left, 3);
        for (c = 0; c + 4 <= vectors; c += 4)
            (now == 3 ? values_3x4 : now == 2 ? values_2x4 : values_1x4)(out + c * LANES, p, v + c * LANES, stride);
        for (; c < vectors; c++)
            (now == 3 ? values_3x1 : now == 2 ? values_2x1 : values_1x1)(out + c * LANES, p, v + c * LANES, stride);
    }
}

// The matrix products of attention over one block of positions, for a few query rows.

#pragma once
#include "attention.h"

// out[m] += x[m][0] * b[0] + x[m][1] * b[1] + ..., in this order for any m in any company: R rows, V registers of each.
#define DEFINE_PRODUCTS(R, V)                                                                      \
    static void products_##R##x##V(                                                                \
        float *out, const float *x, int64_t depth, const float *b, int64_t width                   \
    ) {                                                                                            \
        vf sums[R][V], numbers[R];                                                                 \
        _Pragma("GCC unroll 6") for (int m = 0; m < R; m++)                                        \
            _Pragma("GCC unroll 4") for (int c = 0; c < V; c++)                                    \
                sums[m][c] = load(out + m * width + c * LANES);                                    \
        for (int64_t i = 0; i < depth; i++) {                                                      \
            _Pragma("GCC unroll 6") for (int m = 0; m < R; m++)                                    \
                numbers[m] = kept(splat(x[m * depth + i]));                                        \
            _Pragma("GCC unroll 4") for (int c = 0; c < V; c++) {                                  \
                vf value = kept(load(b + i * width + c * LANES));                                  \
                _Pragma("GCC unroll 6") for (int m = 0; m < R; m++)                                \
                    sums[m][c] += numbers[m] * value;                                              \
            }                                                                                      \
        }                                                                                          \
        _Pragma("GCC unroll 6") for (int m = 0; m < R; m++)                                        \
            _Pragma("GCC unroll 4") for (int c = 0; c < V; c++)                                    \
                store(out + m * width + c * LANES, sums[m][c]);                                    \
    }
#define DEFINE_ROWS(R) DEFINE_PRODUCTS(R, 4) DEFINE_PRODUCTS(R, 1)
#define ROWS(R) [R] = {products_##R##x4, products_##R##x1}
DEFINE_ROWS(1)
DEFINE_ROWS(2)
DEFINE_ROWS(3)
#if LANES == 16  // 24 sums, 6 numbers of x and one of b are 31 of 32 registers; else 12, 3 and one are 16
DEFINE_ROWS(4)
DEFINE_ROWS(5)
DEFINE_ROWS(6)
enum { AT_ONCE = 6 };
#else
enum { AT_ONCE = 3 };
#endif
static void (*const of_rows[AT_ONCE + 1][2])(float *, const float *, int64_t, const float *, int64_t) = {
    ROWS(1), ROWS(2), ROWS(3),
#if LANES == 16
    ROWS(4), ROWS(5), ROWS(6),
#endif
};

// For all rows: out is [rows][width], x is [rows][depth], b is [depth][width]. Rows are dealt out evenly: the few sums of
// one row alone would wait for each other.
static void add_products(float *out, const float *x, int64_t rows, int64_t depth, const float *b, int64_t width) {
    int64_t parts = (rows + AT_ONCE - 1) / AT_ONCE;
    for (int64_t now, c; rows; rows -= now, parts--, out += now * width, x += now * depth) {
        now = (rows + parts - 1) / parts;
        for (c = 0; c + 4 * LANES <= width; c += 4 * LANES) of_rows[now][0](out + c, x, depth, b + c, width);
        for (; c < width; c += LANES) of_rows[now][1](out + c, x, depth, b + c, width);
    }
}

// Products with a plain weight matrix in vectors: each row of W is a dot product with each token.

#pragma once
#include "linear_packed_codes.h"
#include "vectors.h"

struct linear {
    const void *x, *w, *bias;  // [num_tokens, k], [n, k], [n] or null; of one format
    void *out;                 // [num_tokens, n], of that format or float32; [num_tokens, n / 2] if gated
    int64_t num_tokens, n, k, x_stride, format, to_float32, num_threads;
    int64_t gated, gelu;       // rows of gate and up in turns of 16, of which pairs become one number; packed only
    struct codes codes;        // in the place of w, which is not read then
};

// Of a packed W: rows of a tile; rows of W, tokens, or channels of a product of four tiles.
enum { SIDE = 16, CHUNK = 2 * SIDE };

enum {
    ROWS = 4, TOKENS = LANES / ROWS,  // rows of W and tokens that meet in registers: a lane of a sum each
    KEPT_TOKENS = 24 << 10,           // bytes of tokens that the first cache keeps while rows pass
    KEPT_ROWS = 128 << 10             // bytes of rows that the second cache keeps for all tokens
};

// Of the numbers of a packed W. Codes become float32 where vectors of rows are multiplied, which have no other numbers:
// rounding each of them to bfloat16 would take longer than its product.
static inline int64_t format_of_weights(const struct linear *a) {
#ifdef HAVE_LANES
    if (a->codes.bits) return FLOAT32;
#endif
    return a->format;
}

// How many times 16 bits a row of a packed W takes as numbers.
static inline int64_t row_halves(const struct linear *a) { return a->k * (format_of_weights(a) == FLOAT32 ? 2 : 1); }

static inline float number(int64_t format, const void *p, int64_t i) {
    switch (format) {
    case FLOAT32: return ((const float *)p)[i];
    case BFLOAT16: return from_bf16(((const uint16_t *)p)[i]);
    default: return (float)((const _Float16 *)p)[i];
    }
}

// A token as float32, zeros behind it.
#define WIDEN(T, LOAD)                                                                                \
    for (; c + LANES <= a->k; c += LANES) store(out + c, LOAD((const T *)a->x + token * a->x_stride + c)); \
    break
static void widen_token(const struct linear *a, int64_t token, int64_t padded, float *out) {
    int64_t c = 0;
    switch (a->format) {
    case FLOAT32: WIDEN(float, load);
    case BFLOAT16: WIDEN(uint16_t, load_bf16);
    default: WIDEN(_Float16, load_f16);
    }
    for (; c < a->k; c++) out[c] = number(a->format, a->x, token * a->x_stride + c);
    for (; c < padded; c++) out[c] = 0;
}

static inline void write_dot(const struct linear *a, int64_t token, int64_t row, float sum) {
    if (a->bias) sum += number(a->format, a->bias, row);
    int64_t at = token * a->n + row;
    if (a->format == FLOAT32 || a->to_float32) ((float *)a->out)[at] = sum;
    else if (a->format == BFLOAT16) ((uint16_t *)a->out)[at] = to_bf16(sum);
    else ((_Float16 *)a->out)[at] = (_Float16)sum;
}

// Rows of W and tokens that meet: W's rows first .. end - 1 lie at `stored`, and the tokens, `count` from the one called
// `token`, at x.
struct meeting {
    const void *stored;
    int64_t first, end;
    const float *x;  // [count, padded]
    int64_t padded, token, count;
};

// Rows and tokens that are missing repeat the last one, and are not written. next: the rows after these, which are brought to
// the second cache meanwhile; four rows at once, each soon over, are more than a processor reads ahead of by itself.
#define DEFINE_DOTS(NAME, T, LOAD)                                                                        \
    static void NAME(const struct linear *a, const struct meeting *m) {                                   \
        int64_t whole = a->k / LANES * LANES, rest = a->k - whole;                                        \
        for (int64_t row = m->first; row < m->end; row += ROWS) {                                         \
            const T *w[ROWS];                                                                             \
            T last[ROWS][LANES];                                                                          \
            const char *next = (const char *)m->stored + (row + ROWS - m->first) * a->k * (int64_t)sizeof(T); \
            memset(last, 0, sizeof last);                                                                 \
            for (int64_t i = 0; i < ROWS; i++) {                                                          \
                w[i] = (const T *)m->stored + (min64(row + i, m->end - 1) - m->first) * a->k;             \
                memcpy(last[i], w[i] + whole, (size_t)rest * sizeof(T));                                  \
            }                                                                                             \
            for (int64_t t = 0; t < m->count; t += TOKENS) {                                              \
                const float *in[TOKENS];                                                                  \
                vf sums[LANES] = {};                                                                      \
                for (int64_t i = 0; i < TOKENS; i++) in[i] = m->x + min64(t + i, m->count - 1) * m->padded; \
                for (int64_t c = 0; c < m->padded; c += LANES) {                                          \
                    for (size_t i = 0; i < ROWS * LANES * sizeof(T); i += 64)                             \
                        __builtin_prefetch(next + (size_t)c * ROWS * sizeof(T) + i, 0, 2);                \
                    vf tokens[TOKENS];                                                                    \
                    _Pragma("GCC unroll 4") for (int i = 0; i < TOKENS; i++) tokens[i] = load(in[i] + c); \
                    _Pragma("GCC unroll 4") for (int i = 0; i < ROWS; i++) {                              \
                        vf weights = c < whole ? LOAD(w[i] + c) : LOAD(last[i]);                          \
                        _Pragma("GCC unroll 4") for (int j = 0; j < TOKENS; j++)                          \
                            sums[i * TOKENS + j] += weights * tokens[j];                                  \
                    }                                                                                     \
                }                                                                                         \
                vf all = fold(sums);                                                                      \
                for (int64_t i = 0; i < min64(ROWS, m->end - row); i++)                                   \
                    for (int64_t j = 0; j < min64(TOKENS, m->count - t); j++)                             \
                        write_dot(a, m->token + t + j, row + i, all[i * TOKENS + j]);                     \
            }                                                                                             \
        }                                                                                                 \
    }
DEFINE_DOTS(float32_dots, float, load)
DEFINE_DOTS(bfloat16_dots, uint16_t, load_bf16)
DEFINE_DOTS(float16_dots, _Float16, load_f16)

static void dots(const struct linear *a, const struct meeting *m) {
    switch (a->format) {
    case FLOAT32: float32_dots(a, m); break;
    case BFLOAT16: bfloat16_dots(a, m); break;
    default: float16_dots(a, m);
    }
}

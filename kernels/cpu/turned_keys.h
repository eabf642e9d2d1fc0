// A block of stored keys, of any format, as floats with the positions side by side: so a lane has a logit of its own, and
// a logit is one sum over the channels for any number of queries.

#pragma once
#include "cache_rows.h"

// Four words of LANES rows: x[r] has those of rows r, r + 4, ... A piece put in its place as it is loaded is cheaper than a
// shuffle later.
static inline __attribute__((always_inline)) void load_fours(const uint8_t *p, int64_t stride, vf x[4]) {
    _Pragma("GCC unroll 4") for (int r = 0; r < 4; r++, p += stride) {
#if LANES == 16
        __m512 y = _mm512_castps128_ps512(_mm_loadu_ps((const void *)p));
        y = _mm512_insertf32x4(y, _mm_loadu_ps((const void *)(p + 4 * stride)), 1);
        y = _mm512_insertf32x4(y, _mm_loadu_ps((const void *)(p + 8 * stride)), 2);
        x[r] = (vf)_mm512_insertf32x4(y, _mm_loadu_ps((const void *)(p + 12 * stride)), 3);
#elif LANES == 8
        __m256 y = _mm256_castps128_ps256(_mm_loadu_ps((const void *)p));
        x[r] = (vf)_mm256_insertf128_ps(y, _mm_loadu_ps((const void *)(p + 4 * stride)), 1);
#else
        x[r] = load((const void *)p);
#endif
    }
}

// Numbers of a and b in turn, of the lower or the upper half of each four.
static inline vf deal(vf a, vf b, int upper) {
    vi lane = lanes();
    return __builtin_shuffle(a, b, (lane & -4) + (lane & 3) / 2 + (lane & 1) * LANES + 2 * upper);
}
// Then x[i] has word i of each row, in their order.
static inline __attribute__((always_inline)) void turn_fours(vf x[4]) {
    vf even = deal(x[0], x[2], 0), odd = deal(x[1], x[3], 0), even2 = deal(x[0], x[2], 1), odd2 = deal(x[1], x[3], 1);
    x[0] = deal(even, odd, 0);
    x[1] = deal(even, odd, 1);
    x[2] = deal(even2, odd2, 0);
    x[3] = deal(even2, odd2, 1);
}

// The number in bits 32 / n * i .. of each word, n of them.
static inline __attribute__((always_inline)) vf number_of(int64_t format, vu word, int i) {
    switch (format) {
    case FLOAT32: return (vf)word;
    case BFLOAT16: return (vf)(i ? word & 0xffff0000 : word << 16);
    case FLOAT16: {
        vu16 halves = __builtin_convertvector(word >> 16 * i, vu16);
        return load_f16((const _Float16 *)&halves);
    }
    case INT8: return to_float((vi)(word << (24 - 8 * i)) >> 24);
    case FP8: return from_e4m3(word >> 8 * i);
    default: return from_nibbles(word >> 4 * i);
    }
}

// LANES rows of d channels, one behind the other, become [channels][BLOCK]. They are turned a word at a time, as a word has
// up to eight channels, and four words together.
enum { FOUR_WORDS = 16 };
static inline __attribute__((always_inline)) void turn_all(int64_t format, const uint8_t *rows, int64_t d, float *restrict out) {
    int bits = (int)BITS[format];
    int64_t bytes = d * bits / 8;
    for (int64_t at = 0; at < bytes; at += FOUR_WORDS) {
        vf x[4];
        load_fours(rows + at, bytes, x);
        turn_fours(x);
        _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
            _Pragma("GCC unroll 8") for (int n = 0; n < 32 / bits; n++) {
                int64_t byte = at + 4 * i, c = byte * 8 / bits + n, end = d;
                if (format == INT4) {  // channel c and channel c + d / 2 are in one byte
                    c = byte + n / 2 + n % 2 * (d / 2);
                    end = n % 2 ? d : d / 2;
                }
                if (c < end) store(out + c * BLOCK, number_of(format, (vu)x[i], n));
            }
    }
}

// Where the stored rows of positions first .. first + LANES - 1 are one behind the other: in the cache or, those outside
// begin .. end - 1 as zeros, in a copy. So are rows that do not fill their last four words: what is behind them is read too,
// and behind the cache's last row there is nothing.
static const uint8_t *rows_together(
    const struct attention *a, int64_t row, int64_t kv_head, int64_t first, int64_t begin, int64_t end, uint8_t *copy
) {
    int64_t bytes = a->head_dim * BITS[a->cache_format] / 8, at = max64(first, begin), count;
    const uint8_t *k = a->k;
    end = min64(first + LANES, end);
    if (end - at < LANES) memset(copy, 0, (size_t)(LANES * bytes));
    for (; at < end; at += count) {
        const uint8_t *rows = k + stored_row(a, row, kv_head, at, end, &count) * bytes;
        if (count == LANES && bytes % FOUR_WORDS == 0) return rows;
        memcpy(copy + (at - first) * bytes, rows, (size_t)(count * bytes));
    }
    return copy;
}

// Keys of positions begin .. end - 1 of a row, all in one block, as [channels][BLOCK], in their places; the others, which no
// query sees, are made of zeros.
static void read_keys(const struct attention *a, int64_t row, int64_t kv_head, int64_t begin, int64_t end, float *out) {
    uint8_t copy[LANES * MAX_DIM * 4 + FOUR_WORDS];
    for (int64_t j = 0, start = begin / BLOCK * BLOCK; j < BLOCK; j += LANES, out += LANES) {
        const uint8_t *rows = rows_together(a, row, kv_head, start + j, begin, end, copy);
        switch (a->cache_format) {
        case FLOAT32: turn_all(FLOAT32, rows, a->head_dim, out); break;
        case BFLOAT16: turn_all(BFLOAT16, rows, a->head_dim, out); break;
        case FLOAT16: turn_all(FLOAT16, rows, a->head_dim, out); break;
        case INT8: turn_all(INT8, rows, a->head_dim, out); break;
        case FP8: turn_all(FP8, rows, a->head_dim, out); break;
        default: turn_all(INT4, rows, a->head_dim, out); break;
        }
    }
}

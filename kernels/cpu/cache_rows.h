// Stored rows of the cache, of any format, as floats.

#pragma once
#include "attention.h"

static const int64_t BITS[] = {[FLOAT32] = 32, [BFLOAT16] = 16, [FLOAT16] = 16, [INT8] = 8, [FP8] = 8, [INT4] = 4};

// LANES values of a format that has one element each, from element i on.
static inline vf widen(int64_t format, const void *source, int64_t i) {
    switch (format) {
    case FLOAT32: return load((const float *)source + i);
    case BFLOAT16: return load_bf16((const uint16_t *)source + i);
    case FLOAT16: return load_f16((const _Float16 *)source + i);
    case INT8: return load_i8((const int8_t *)source + i);
    default: return load_e4m3((const uint8_t *)source + i);
    }
}

// The format is a constant in each call, so the choice is made once and not for every vector.
static inline __attribute__((always_inline)) void widen_all(int64_t format, const void *source, int64_t n, float *restrict out) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, widen(format, source, i));
    if (i == n) return;
    uint8_t rest[4 * LANES] = {}, bytes = (uint8_t)(BITS[format] / 8);
    memcpy(rest, (const uint8_t *)source + i * bytes, (size_t)((n - i) * bytes));
    float values[LANES];
    store(values, widen(format, rest, 0));
    memcpy(out + i, values, (size_t)(n - i) * 4);
}

// n values of a format that has one element each.
static void widen_flat(int64_t format, const void *source, int64_t n, float *restrict out) {
    switch (format) {
    case FLOAT32: widen_all(FLOAT32, source, n, out); return;
    case BFLOAT16: widen_all(BFLOAT16, source, n, out); return;
    case FLOAT16: widen_all(FLOAT16, source, n, out); return;
    case INT8: widen_all(INT8, source, n, out); return;
    case FP8: widen_all(FP8, source, n, out); return;
    }
}

// One row of d channels of int4.
static void widen_halves(const uint8_t *source, int64_t d, float *restrict out) {
    int64_t c = 0;
    for (; c + LANES <= d / 2; c += LANES) {
        store(out + c, load_nibbles(source + c, 0));
        store(out + c + d / 2, load_nibbles(source + c, 4));
    }
    for (; c < d / 2; c++) {
        out[c] = (float)(source[c] & 15) - 7.5f;
        out[c + d / 2] = (float)(source[c] >> 4) - 7.5f;
    }
}

// `count` stored rows of one KV head, one behind the other, into rows of `padded` floats.
static void widen_rows(
    const struct attention *a, const void *rows, int64_t row, int64_t count, int64_t padded, float *restrict out
) {
    int64_t d = a->head_dim, bytes = d * BITS[a->cache_format] / 8;
    const uint8_t *source = (const uint8_t *)rows + row * bytes;
    if (a->cache_format != INT4 && padded == d) {
        widen_flat(a->cache_format, source, count * d, out);
        return;
    }
    for (int64_t j = 0; j < count; j++, source += bytes, out += padded) {
        if (a->cache_format != INT4) widen_flat(a->cache_format, source, d, out);
        else widen_halves(source, d, out);
        memset(out + d, 0, (size_t)(padded - d) * 4);
    }
}

// The stored row of the position `at` of a row; the next `*count` positions, up to `end`, are stored behind it.
static inline int64_t stored_row(const struct attention *a, int64_t row, int64_t kv_head, int64_t at, int64_t end, int64_t *count) {
    *count = min64(end, (at / a->block_size + 1) * a->block_size) - at;
    int64_t block = a->block_tables[row * a->table_stride + at / a->block_size];
    return (block * a->num_kv_heads + kv_head) * a->block_size + at % a->block_size;
}

// Positions of a row that will be read next. Blocks lie anywhere in memory, so only we know where; asked for in time, they
// are in the processor's cache when their turn comes. Some at a time, between other work: few requests can be under way.
struct ahead {
    int64_t row, kv_head, at, end;
};
static void fetch_some(const struct attention *a, struct ahead *ahead) {
    enum { SOME = 16, TO_L2 = 2 };
    int64_t bytes = a->head_dim * BITS[a->cache_format] / 8, end = min64(ahead->at + SOME, ahead->end);
    for (int64_t count; ahead->at < end; ahead->at += count) {
        int64_t stored = stored_row(a, ahead->row, ahead->kv_head, ahead->at, end, &count);
        const char *k = (const char *)a->k + stored * bytes, *v = (const char *)a->v + stored * bytes;
        for (int64_t i = 0; i < count * bytes; i += 64) {
            __builtin_prefetch(k + i, 0, TO_L2);
            __builtin_prefetch(v + i, 0, TO_L2);
        }
        if (a->k_scale) {
            __builtin_prefetch(a->k_scale + stored, 0, TO_L2);
            __builtin_prefetch(a->v_scale + stored, 0, TO_L2);
        }
    }
}

struct scales {
    float k[BLOCK], v[BLOCK];
    float unused[LANES];  // a register may be read from any place
};

// The scales of positions begin .. end - 1 of a row, all in one block, in their places; of the others zero.
static void read_scales(
    const struct attention *a, int64_t row, int64_t kv_head, int64_t begin, int64_t end, float k_gain, float v_gain, struct scales *s
) {
    memset(s, 0, sizeof *s);
    for (int64_t at = begin, count; at < end; at += count) {
        int64_t stored = stored_row(a, row, kv_head, at, end, &count);
        const _Float16 *k = a->k_scale + stored, *v = a->v_scale + stored;
        float *k_out = s->k + at % BLOCK, *v_out = s->v + at % BLOCK;
        int64_t j = 0;
        for (; j + LANES <= count; j += LANES) {
            store(k_out + j, load_f16(k + j) * k_gain);
            store(v_out + j, load_f16(v + j) * v_gain);
        }
        for (; j < count; j++) {
            k_out[j] = (float)k[j] * k_gain;
            v_out[j] = (float)v[j] * v_gain;
        }
    }
}

// Values of positions begin .. end - 1 of a row, all in one block, in their places; of the others zero.
static void read_values(
    const struct attention *a, int64_t row, int64_t kv_head, int64_t begin, int64_t end, int64_t padded, float *out
) {
    int64_t first = begin % BLOCK, after = first + end - begin;
    memset(out, 0, (size_t)(first * padded) * 4);
    memset(out + after * padded, 0, (size_t)((BLOCK - after) * padded) * 4);
    for (int64_t at = begin, count; at < end; at += count) {
        int64_t stored = stored_row(a, row, kv_head, at, end, &count);
        widen_rows(a, a->v, stored, count, padded, out + at % BLOCK * padded);
    }
}

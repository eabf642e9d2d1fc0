// Stored rows of the cache, of any format, as floats.

#pragma once
#include "products.h"

// n values of a format that has one element each.
static void widen_flat(int64_t format, const void *source, int64_t n, float *restrict out) {
    switch (format) {
    case FLOAT32: memcpy(out, source, (size_t)n * 4); return;
    case BFLOAT16: {
        const uint16_t *in = source;
        for (int64_t i = 0; i < n; i++) out[i] = from_bf16(in[i]);
        return;
    }
    case FLOAT16: {
        const _Float16 *in = source;
        for (int64_t i = 0; i < n; i++) out[i] = (float)in[i];
        return;
    }
    case INT8: {
        const int8_t *in = source;
        for (int64_t i = 0; i < n; i++) out[i] = (float)in[i];
        return;
    }
    case FP8: {  // the exponent and mantissa of e4m3 in a float's place are the value times 2^-120
        const uint8_t *in = source;
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = (uint32_t)(in[i] & 0x80) << 24 | (uint32_t)(in[i] & 0x7f) << 20;
            float f;
            memcpy(&f, &bits, 4);
            out[i] = f * 0x1p120f;
        }
        return;
    }
    }
}

static const int64_t BITS[] = {[FLOAT32] = 32, [BFLOAT16] = 16, [FLOAT16] = 16, [INT8] = 8, [FP8] = 8, [INT4] = 4};

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
        else
            for (int64_t c = 0; c < d / 2; c++) {
                out[c] = (float)((int)(source[c] & 15) - 8);
                out[c + d / 2] = (float)((int)(source[c] >> 4) - 8);
            }
        memset(out + d, 0, (size_t)(padded - d) * 4);
    }
}

struct tile {
    float k[BLOCK * MAX_DIM], v[BLOCK * MAX_DIM], k_scale[BLOCK], v_scale[BLOCK];
};

// Positions begin .. end - 1 of a row, all in one block, into their places; what is not read is zero.
static void read_block(
    const struct attention *a, int64_t row, int64_t kv_head, int64_t begin, int64_t end, int64_t padded, struct tile *t
) {
    int64_t first = begin % BLOCK, after = first + end - begin;
    for (int i = 0; i < 2; i++) {
        float *rows = i ? t->v : t->k, *scales = i ? t->v_scale : t->k_scale;
        memset(rows, 0, (size_t)(first * padded) * 4);
        memset(rows + after * padded, 0, (size_t)((BLOCK - after) * padded) * 4);
        memset(scales, 0, sizeof t->k_scale);
    }
    for (int64_t at = begin; at < end;) {
        int64_t count = min64(end, (at / a->block_size + 1) * a->block_size) - at, place = at % BLOCK;
        int64_t block = a->block_tables[row * a->table_stride + at / a->block_size];
        int64_t stored = (block * a->num_kv_heads + kv_head) * a->block_size + at % a->block_size;
        widen_rows(a, a->k, stored, count, padded, t->k + place * padded);
        widen_rows(a, a->v, stored, count, padded, t->v + place * padded);
        if (a->k_scale)
            for (int64_t j = 0; j < count; j++) {
                t->k_scale[place + j] = (float)a->k_scale[stored + j];
                t->v_scale[place + j] = (float)a->v_scale[stored + j];
            }
        at += count;
    }
}


// Rows of a weight matrix by their ids: the lookups of an embedding.

#pragma once
#include "linear_lanes.h"
#include "linear_tiles.h"

struct rows {
    const void *w;
    const int64_t *ids;
    void *out;
    int64_t num_tokens, first_row, whole, n, k, number_bytes, packed, format;  // whole: W has all rows that there are
    struct codes codes;  // in the place of w
    float scale;         // 1: numbers of any format are copied
};

static void scale_numbers(const struct rows *a, void *out) {
    for (int64_t c = 0; c < a->k; c++) {
        float x = number(a->format, out, c) * a->scale;
        if (a->format == FLOAT32) ((float *)out)[c] = x;
        else if (a->format == BFLOAT16) ((uint16_t *)out)[c] = to_bf16(x);
        else ((_Float16 *)out)[c] = (_Float16)x;
    }
}

// out[i] = row ids[i] - first_row of W times the scale. Where W has no such row: zeros, or 2 is returned if it is whole.
int linear_rows(const struct rows *a) {
    int64_t row_bytes = a->k * a->number_bytes;
    for (int64_t i = 0; i < a->num_tokens; i++) {
        uint8_t *out = (uint8_t *)a->out + i * row_bytes;
        int64_t row = a->ids[i] - a->first_row;
        if (row < 0 || row >= a->n) {
            if (a->whole) return 2;
            memset(out, 0, (size_t)row_bytes);
            continue;
        }
        int packed = a->packed && row < a->n / 32 * 32;
        if (a->codes.bits) widen_row_of(&a->codes, row, packed, a->format, out);
#ifdef PACKS
        else if (packed) {
            const uint16_t *chunk = (const uint16_t *)((const uint8_t *)a->w + row / CHUNK * CHUNK * row_bytes);
            for (int64_t word = 0; word < row_bytes / 4; word++)
                memcpy(out + 4 * word, chunk + place_in_chunk(row % CHUNK, word), 4);
        }
#endif
        else memcpy(out, (const uint8_t *)a->w + row * row_bytes, (size_t)row_bytes);
        if (a->scale != 1) scale_numbers(a, out);
    }
    return 0;
}

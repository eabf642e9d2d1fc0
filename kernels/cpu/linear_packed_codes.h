// Codes that are packed, in the layout of this processor, and single rows of any.

#pragma once
#include <stdlib.h>

#include "linear_lane_codes.h"
#include "linear_tile_codes.h"

#if defined(HAVE_AMX) || defined(HAVE_LANES)
#define PACKS 1

// A group's numbers, of a packed matrix.
static void widen_packed_group(const struct codes *w, int64_t row, int64_t group, float *out) {
    int64_t at = (row / 32 * w->groups + group) * 32;
    float scale = (float)w->scales[at + row % 32], least = w->minima ? (float)w->minima[at + row % 32] : 0;
    for (int64_t c = 0; c < GROUP; c++) {
        int64_t code = packed_code(w, w->codes + at * group_bytes(w), row % 32, c);
        if (w->minima) out[c] = (float)code * scale + least;
        else out[c] = (float)(w->bits == 4 ? code - 8 : code) * scale;
    }
}

// 32 rows of codes, in place; `room` is as large as they are.
static void pack_chunk_codes(const struct codes *w, int64_t chunk, uint8_t *room) {
    int64_t bytes = group_bytes(w), chunk_bytes = 32 * w->groups * bytes;
    uint8_t *codes = (uint8_t *)w->codes + chunk * chunk_bytes;
    memset(room, 0, (size_t)chunk_bytes);
    for (int64_t row = 0; row < 32; row++)
        for (int64_t group = 0; group < w->groups; group++)
            pack_group(w, codes + (row * w->groups + group) * bytes, row, room + group * 32 * bytes);
    memcpy(codes, room, (size_t)chunk_bytes);
}

// 32 rows of scales or minima, in place.
static void turn_scales(const _Float16 *scales, int64_t chunk, int64_t groups, uint8_t *room) {
    const uint16_t *in = (const uint16_t *)scales + chunk * 32 * groups;
    uint16_t *out = (uint16_t *)room;
    for (int64_t row = 0; row < 32; row++)
        for (int64_t group = 0; group < groups; group++) out[group * 32 + row] = in[row * groups + group];
    memcpy((uint16_t *)in, room, (size_t)(64 * groups));
}

// n rows of codes, in place; those past the last whole 32 stay as they are. Returns 1 for want of memory.
static int pack_codes(const struct codes *w, int64_t n) {
    uint8_t *room = malloc((size_t)(32 * GROUP * w->groups));
    if (!room) return 1;
    for (int64_t chunk = 0; chunk < n / 32; chunk++) {
        pack_chunk_codes(w, chunk, room);
        turn_scales(w->scales, chunk, w->groups, room);
        if (w->minima) turn_scales(w->minima, chunk, w->groups, room);
    }
    free(room);
    return 0;
}
#endif

// A row as numbers of a format. packed: it lies in a packed chunk.
static void widen_row_of(const struct codes *w, int64_t row, int packed, int64_t format, void *out) {
    int64_t bytes = format == FLOAT32 ? 4 : 2;
    for (int64_t group = 0; group < w->groups; group++) {
        float x[GROUP];
#ifdef PACKS
        if (packed) widen_packed_group(w, row, group, x);
        else
#endif
            widen_group(w, row, group, x);
        round_group(x, format, (uint8_t *)out + group * GROUP * bytes);
    }
}

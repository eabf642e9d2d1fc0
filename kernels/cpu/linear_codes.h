// Weights that are kept as codes (kernels/weight_codes.py), and their numbers. A number is made in float32, exactly but for
// the last sum, and rounded once to the format of the matrix.
//
// For the matrix unit codes lie packed, 32 rows for 32 rows where they were. What becomes one tile (linear_tiles.h) lies together,
// and in its order, so that making tiles takes no permutation but that of the scales. Lanes of a register are rows and pairs
// of channels: lane 2 i + j is row i, or 8 + i, and channel j of a pair.
//     codes of 8 bits   [K / 32][2 tiles][16 pairs][16 rows][2 channels]
//     codes of 4 bits   [K / 32][2 tiles][4 of 4 pairs][16 lanes] words: from the lowest bits on, rows 0 .. 7 and rows 8 .. 15
//                       of the first pair, then of the next
//     scales, minima    [K / 32][32 rows]

#pragma once
#include <stdlib.h>

#include "matrix_unit.h"
#include "vectors.h"

struct codes {
    const uint8_t *codes;
    const _Float16 *scales, *minima;  // minima may be null
    int64_t bits, groups;             // bits 0: not codes; groups of 32 channels in a row
};

enum { GROUP = 32 };

#ifdef HAVE_AMX
enum { PACKS_CODES = 1 };
#else
enum { PACKS_CODES = 0 };  // they lie in rows even where numbers would be packed
#endif

static inline int64_t group_bytes(const struct codes *w) { return GROUP * w->bits / 8; }

// A group's numbers.
static inline void widen_group(const struct codes *w, int64_t row, int64_t group, float *out) {
    int64_t at = row * w->groups + group;
    const uint8_t *codes = w->codes + at * group_bytes(w);
    float scale = (float)w->scales[at];
    if (w->bits == 8) {
        for (int i = 0; i < GROUP; i += LANES) store(out + i, load_i8((const int8_t *)codes + i) * scale);
        return;
    }
    for (int i = 0; i < GROUP / 2; i += LANES) {
        vu both = wide_u8(codes + i);
        vi lower = (vi)(both & 15), upper = (vi)(both >> 4);
        if (w->minima) {
            float least = (float)w->minima[at];
            store(out + i, to_float(lower) * scale + least);
            store(out + GROUP / 2 + i, to_float(upper) * scale + least);
        } else {
            store(out + i, to_float(lower - 8) * scale);
            store(out + GROUP / 2 + i, to_float(upper - 8) * scale);
        }
    }
}

// The same of a packed matrix.
static inline void widen_packed_group(const struct codes *w, int64_t row, int64_t group, float *out) {
    int64_t chunk = row / 32 * w->groups + group, half = row % 32 / 16, r = row % 16;
    const uint8_t *codes = w->codes + (chunk * 32 + half * 16) * group_bytes(w);
    float scale = (float)w->scales[chunk * 32 + row % 32];
    float least = w->minima ? (float)w->minima[chunk * 32 + row % 32] : 0;
    for (int64_t c = 0; c < GROUP; c++) {
        int64_t pair = c / 2, code;
        if (w->bits == 8) code = ((const int8_t *)codes)[pair * 32 + r * 2 + c % 2];
        else {
            uint32_t word;
            memcpy(&word, codes + (pair / 4 * 16 + r % 8 * 2 + c % 2) * 4, 4);
            code = (int64_t)(word >> (pair % 4 * 8 + r / 8 * 4) & 15) - (w->minima ? 0 : 8);
        }
        out[c] = w->minima ? (float)code * scale + least : (float)code * scale;
    }
}

static inline void round_group(const float *x, int64_t format, void *out) {
    for (int i = 0; i < GROUP; i += LANES) switch (format) {
        case FLOAT32: store((float *)out + i, load(x + i)); break;
        case BFLOAT16: store_bf16((uint16_t *)out + i, load(x + i)); break;
        default: store_f16((_Float16 *)out + i, load(x + i));
        }
}

// A row as numbers of a format. packed: it would lie in a packed chunk.
static void widen_row_of(const struct codes *w, int64_t row, int packed, int64_t format, void *out) {
    int64_t bytes = format == FLOAT32 ? 4 : 2;
    for (int64_t group = 0; group < w->groups; group++) {
        float x[GROUP];
        if (packed && PACKS_CODES) widen_packed_group(w, row, group, x);
        else widen_group(w, row, group, x);
        round_group(x, format, (uint8_t *)out + group * GROUP * bytes);
    }
}

#ifdef HAVE_AMX
enum { CODES_AHEAD = 2048 };  // bytes from the codes that are being fetched to those at work

static inline __m512 fetch_halves(const _Float16 *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }

// 32 rows of 32 channels become two tiles: out[2][16 pairs][16 rows][2].
static inline __attribute__((always_inline)) void widen_tiles(
    int64_t bits, int has_minima, const uint8_t *codes, const _Float16 *scales, const _Float16 *minima, uint16_t *out
) {
    const __m512i lower = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    __m512 numbers = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);  // of codes of 4 bits
    if (!has_minima) numbers = _mm512_sub_ps(numbers, _mm512_set1_ps(8));
    _mm_prefetch((const char *)(scales + 8 * 32), _MM_HINT_T0);
    if (has_minima) _mm_prefetch((const char *)(minima + 8 * 32), _MM_HINT_T0);
    for (int half = 0; half < 2; half++, scales += 16, minima += has_minima ? 16 : 0) {
        __m512 of_rows = fetch_halves(scales), least[2] = {};
        __m512 scale[2] = {_mm512_permutexvar_ps(lower, of_rows), _mm512_permutexvar_ps(upper, of_rows)};
        if (has_minima) {
            of_rows = fetch_halves(minima);
            least[0] = _mm512_permutexvar_ps(lower, of_rows);
            least[1] = _mm512_permutexvar_ps(upper, of_rows);
        }
        for (int four = 0; four < 4; four++) {
            __m512i words;
            if (bits == 4) {
                words = _mm512_loadu_si512(codes);
                _mm_prefetch((const char *)codes + CODES_AHEAD, _MM_HINT_T0);
                codes += 64;
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++, out += 32) {
                __m512 x[2];
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++) {
                    if (bits == 4) x[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, (unsigned)(8 * i + 4 * j)), numbers);
                    else x[j] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(codes + 16 * j))));
                    x[j] = has_minima ? _mm512_fmadd_ps(x[j], scale[j], least[j]) : _mm512_mul_ps(x[j], scale[j]);
                }
                if (bits == 8) {
                    if (i % 2 == 0) _mm_prefetch((const char *)codes + CODES_AHEAD, _MM_HINT_T0);
                    codes += 32;
                }
                _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]));
            }
        }
    }
}

// 32 channels of a packed chunk of 32 rows as the tiles of a product (linear_tiles.h): out[2][16 pairs][16 rows][2].
static inline __attribute__((always_inline)) void widen_product(const struct codes *w, int64_t chunk, int64_t group, uint16_t *out) {
    int64_t at = (chunk * w->groups + group) * 32;
    const uint8_t *codes = w->codes + at * group_bytes(w);
    const _Float16 *scales = w->scales + at;
    if (w->bits == 8) widen_tiles(8, 0, codes, scales, NULL, out);
    else if (w->minima) widen_tiles(4, 1, codes, scales, w->minima + at, out);
    else widen_tiles(4, 0, codes, scales, NULL, out);
}

static void widen_chunk(const struct codes *w, int64_t chunk, uint16_t *out) {
    for (int64_t group = 0; group < w->groups; group++) widen_product(w, chunk, group, out + group * 32 * GROUP);
}

// 32 rows of codes, in place; `room` is as large as they are.
static void pack_chunk_codes(const struct codes *w, int64_t chunk, uint8_t *room) {
    int64_t bytes = group_bytes(w), chunk_bytes = 32 * w->groups * bytes;
    uint8_t *codes = (uint8_t *)w->codes + chunk * chunk_bytes;
    memset(room, 0, (size_t)chunk_bytes);
    for (int64_t row = 0; row < 32; row++)
        for (int64_t group = 0; group < w->groups; group++) {
            const uint8_t *in = codes + (row * w->groups + group) * bytes;
            uint8_t *out = room + (group * 32 + row / 16 * 16) * bytes;
            int64_t r = row % 16;
            for (int64_t pair = 0; pair < 16; pair++) {
                if (w->bits == 8) {
                    memcpy(out + pair * 32 + r * 2, in + 2 * pair, 2);
                    continue;
                }
                for (int64_t c = 2 * pair; c < 2 * pair + 2; c++) {
                    uint8_t code = (uint8_t)(in[c % 16] >> (c / 16 * 4) & 15);
                    int64_t word = pair / 4 * 16 + r % 8 * 2 + c % 2;
                    out[word * 4 + pair % 4] |= (uint8_t)(code << (r / 8 * 4));
                }
            }
        }
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

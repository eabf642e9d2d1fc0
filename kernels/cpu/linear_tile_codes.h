// Codes packed for the matrix unit, 32 rows for 32 rows where they were. What becomes one tile (linear_tiles.h) lies together,
// and in its order, so that making tiles takes no permutation but that of the scales. Lanes of a register are rows and pairs
// of channels: lane 2 i + j is row i, or 8 + i, and channel j of a pair.
//     codes of 8 bits   [K / 32][2 tiles][16 pairs][16 rows][2 channels]
//     codes of 4 bits   [K / 32][2 tiles][4 of 4 pairs][16 lanes] words: from the lowest bits on, rows 0 .. 7 and rows 8 .. 15
//                       of the first pair, then of the next
//     scales, minima    [K / 32][32 rows]

#pragma once
#include "linear_codes.h"

#ifdef HAVE_AMX
// The 32 codes of one of 32 rows to their places among the others', which are zeros before.
static void pack_group(const struct codes *w, const uint8_t *in, int64_t row, uint8_t *out) {
    int64_t r = row % 16;
    out += row / 16 * 16 * group_bytes(w);
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

static int64_t packed_code(const struct codes *w, const uint8_t *codes, int64_t row, int64_t c) {
    int64_t pair = c / 2, r = row % 16;
    uint32_t word;
    codes += row / 16 * 16 * group_bytes(w);
    if (w->bits == 8) return ((const int8_t *)codes)[pair * 32 + r * 2 + c % 2];
    memcpy(&word, codes + (pair / 4 * 16 + r % 8 * 2 + c % 2) * 4, 4);
    return (int64_t)(word >> (pair % 4 * 8 + r / 8 * 4) & 15);
}

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
#endif

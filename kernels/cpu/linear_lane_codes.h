// Codes packed for vectors of rows (linear_lanes.h), 32 rows for 32 rows where they were, so that a vector of codes becomes the
// numbers of a channel and nothing is turned.
//     codes of 8 bits   [K / 32][32 channels][32 rows]
//     codes of 4 bits   [K / 32][16][32 rows] bytes: channel i in the lower half of byte i of a row, 16 + i in the upper
//     scales, minima    [K / 32][32 rows]

#pragma once
#include "linear_codes.h"

#ifdef HAVE_LANES
// The 32 codes of one of 32 rows to their places.
static void pack_group(const struct codes *w, const uint8_t *in, int64_t row, uint8_t *out) {
    for (int64_t i = 0; i < group_bytes(w); i++) out[i * 32 + row] = in[i];
}

static int64_t packed_code(const struct codes *w, const uint8_t *codes, int64_t row, int64_t c) {
    if (w->bits == 8) return ((const int8_t *)codes)[c * 32 + row];
    return codes[c % 16 * 32 + row] >> (c / 16 * 4) & 15;
}

// A channel of the vector of rows at `codes`.
static inline vf widen_channel(int64_t bits, int has_minima, const uint8_t *codes, int64_t c, vf scale, vf least) {
    if (bits == 8) return load_i8((const int8_t *)codes + c * 32) * scale;
    vi code = (vi)(wide_u8(codes + c % 16 * 32) >> (c / 16 * 4) & 15);
    return has_minima ? to_float(code) * scale + least : to_float(code - 8) * scale;
}

// To the nearest number of bfloat16, ties to even, kept in float32: what is added to x is so much larger that the sum has room
// for its first 8 bits only. For numbers from 2^-126 to below 2^112, as all codes are; -0 becomes 0.
static inline vf rounded_to_bf16(vf x) {
    vf larger = (vf)(((vu)x & 0x7f800000) + (16 << 23 | 1 << 22));  // 1.5 * 2^16 of its power of two
    return x + larger - larger;
}

// As float32; rounded to bfloat16, in float32 still; or two of those in a word.
enum widened { PLAIN, ROUNDED, PAIRED };

// 32 rows of 32 channels word by word (linear_lanes.h).
static inline __attribute__((always_inline)) void widen_words(
    int64_t bits, int has_minima, enum widened as, const uint8_t *codes, const _Float16 *scales, const _Float16 *minima, uint16_t *out
) {
    enum { VECTORS = 32 / LANES };
    vf scale[VECTORS], least[VECTORS];
    for (int i = 0; i < VECTORS; i++) {
        scale[i] = load_f16(scales + i * LANES);
        least[i] = has_minima ? load_f16(minima + i * LANES) : (vf){};
    }
    for (int64_t c = 0; c < GROUP; c += as == PAIRED ? 2 : 1)
        _Pragma("GCC unroll 4") for (int i = 0; i < VECTORS; i++, out += 2 * LANES) {
            vf x = widen_channel(bits, has_minima, codes + i * LANES, c, scale[i], least[i]);
            vu word = (vu)(as == PLAIN ? x : rounded_to_bf16(x));
            if (as == PAIRED) {
                vf odd = widen_channel(bits, has_minima, codes + i * LANES, c + 1, scale[i], least[i]);
                word = word >> 16 | (vu)rounded_to_bf16(odd);
            }
            memcpy(out, &word, sizeof word);
        }
}

#define WIDEN_AS(bits, has_minima)                                                                   \
    (as == PLAIN     ? widen_words(bits, has_minima, PLAIN, codes, scales, minima, out)              \
     : as == ROUNDED ? widen_words(bits, has_minima, ROUNDED, codes, scales, minima, out)            \
                     : widen_words(bits, has_minima, PAIRED, codes, scales, minima, out))

// Channels from .. end - 1 of 32 rows, whole groups, from codes that are packed.
static void widen_lanes(const struct codes *w, int64_t chunk, int64_t from, int64_t end, enum widened as, uint16_t *out) {
    for (int64_t group = from / GROUP; group < end / GROUP; group++, out += 32 * GROUP * (as == PAIRED ? 1 : 2)) {
        int64_t at = (chunk * w->groups + group) * 32;
        const uint8_t *codes = w->codes + at * group_bytes(w);
        const _Float16 *scales = w->scales + at, *minima = w->minima ? w->minima + at : NULL;
        if (w->bits == 8) WIDEN_AS(8, 0);
        else if (minima) WIDEN_AS(4, 1);
        else WIDEN_AS(4, 0);
    }
}
#endif

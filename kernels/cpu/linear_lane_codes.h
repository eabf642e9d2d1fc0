// Codes packed for vectors of rows (linear_lanes.h), 32 rows for 32 rows where they were, so that a vector of codes becomes the
// numbers of a channel and nothing is turned.
//     codes of 8 bits   [K / 32][32 channels][32 rows]
//     codes of 4 bits   [K / 32][16][32 rows] bytes: channel i in the lower half of byte i of a row, 16 + i in the upper
//     scales, minima    [K / 32][32 rows]

#pragma once
#include "linear_codes.h"

#ifdef HAVE_LANES
enum {
    ALL = 32 / LANES,               // vectors of 32 rows
    FEW = 2,                        // tokens whose sums with all of them are kept in registers
    AHEAD = LANES == 16 ? 4096 : 0  // bytes of W, or of its codes, that so few tokens ask for ahead, where that was measured
};

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
    vu both = wide_u8(codes + c % 16 * 32);
    vi code = (vi)(c < 16 ? both & 15 : both >> 4);
    return has_minima ? to_float(code) * scale + least : to_float(code - 8) * scale;
}

// What the codes of a chunk become numbers with, a group at a time.
struct group {
    const uint8_t *codes;
    vf scale[ALL], least[ALL];
};

static inline struct group group_at(const struct codes *w, int64_t bits, int has_minima, int64_t at) {
    struct group group = {.codes = w->codes + at * GROUP * bits / 8};
    _Pragma("GCC unroll 4") for (int64_t i = 0; i < ALL; i++) {
        group.scale[i] = load_f16(w->scales + at + i * LANES);
        if (has_minima) group.least[i] = load_f16(w->minima + at + i * LANES);
    }
    return group;
}

// The i-th vector of rows of a channel.
static inline vf number_of(const struct group *group, int64_t bits, int has_minima, int64_t c, int64_t i) {
    return widen_channel(bits, has_minima, group->codes + i * LANES, c, group->scale[i], group->least[i]);
}

// Channels from .. end - 1 of 32 rows in float32, whole groups, from codes that are packed: out[end - from][32 rows]. at: a
// place among the scales, of which the 32 rows have 32 for each 32 channels.
static inline __attribute__((always_inline)) void widen_channels(
    const struct codes *w, int64_t bits, int has_minima, int64_t chunk, int64_t from, int64_t end, float *out
) {
    int64_t first = chunk * w->groups * 32;
    for (int64_t at = first + from; at < first + end; at += 32) {
        struct group group = group_at(w, bits, has_minima, at);
        for (int64_t c = 0; c < GROUP; c++)
            _Pragma("GCC unroll 4") for (int64_t i = 0; i < ALL; i++, out += LANES) store(out, number_of(&group, bits, has_minima, c, i));
    }
}

// Sums of one or two tokens, x[k][tokens], with 32 rows. Each number is made in a register, and taken in the order of all sums.
static inline __attribute__((always_inline)) void meet_channels(
    const struct codes *w, int64_t bits, int has_minima, int64_t tokens, int64_t chunk, const float *x, vf out[FEW][ALL]
) {
    vf sums[FEW][ALL] = {};
    int64_t first = chunk * w->groups * 32;
    for (int64_t at = first; at < first + w->groups * 32; at += 32) {
        struct group group = group_at(w, bits, has_minima, at);
        _Pragma("GCC unroll 2") for (int64_t half = 0; half < GROUP; half += GROUP / 2)
            for (int64_t pair = 0; pair < GROUP / 2; pair += 2) {
                if (AHEAD && half < 4 * bits) __builtin_prefetch(group.codes + (half + pair) * 32 + AHEAD, 0, 2);  // a line
                _Pragma("GCC unroll 2") for (int64_t c = half + pair; c < half + pair + 2; c++, x += tokens)
                    _Pragma("GCC unroll 4") for (int64_t i = 0; i < ALL; i++) {
                        vf number = number_of(&group, bits, has_minima, c, i);
                        _Pragma("GCC unroll 2") for (int64_t t = 0; t < tokens; t++) sums[t][i] += number * splat(x[t]);
                    }
            }
    }
    memcpy(out, sums, sizeof sums);
}

#define OF_ALL_KINDS(DO, ...)                          \
    do {                                               \
        if (w->bits == 8) DO(w, 8, 0, __VA_ARGS__);    \
        else if (w->minima) DO(w, 4, 1, __VA_ARGS__);  \
        else DO(w, 4, 0, __VA_ARGS__);                 \
    } while (0)

static void widen_lanes(const struct codes *w, int64_t chunk, int64_t from, int64_t end, float *out) {
    OF_ALL_KINDS(widen_channels, chunk, from, end, out);
}

static void meet_codes(const struct codes *w, int64_t chunk, int64_t tokens, const float *x, vf out[FEW][ALL]) {
    if (tokens == 1) OF_ALL_KINDS(meet_channels, 1, chunk, x, out);
    else OF_ALL_KINDS(meet_channels, 2, chunk, x, out);
}
#endif

// Stored rows of the cache, of any format, as the bfloat16 tiles of the matrix unit (amx.h).

#pragma once
#include "cache_rows.h"
#include "matrix_unit.h"

#ifdef HAVE_AMX
// Codes of 8 bits become bfloat16 numbers 2^-112 times as large: that is where the bits of a float16 land when its
// fraction is cut to 7 bits. Queries and value scales are made 2^64 times as large, key scales and outputs 2^48 times,
// which restores both products; powers of two cost no precision.
static const float GAIN_IN = 0x1p64f, GAIN_OUT = 0x1p48f;

static inline int has_gain(int64_t format) { return format == INT8 || format == FP8; }

static inline int takes_tiles(const struct attention *a) {
    return a->q_format == BFLOAT16 && a->cache_format != FLOAT32 && a->cache_format != FLOAT16 && tiles_granted();
}

struct halves {
    _Alignas(64) uint16_t k[BLOCK * MAX_DIM], v[BLOCK * MAX_DIM];  // k: [position][channel], v: pairs of positions
    const uint16_t *keys[BLOCK / 16];                              // where each 16 keys are: in k, or in the cache
};

// The bits of a float16 number, as those of the bfloat16 number 2^-112 times as large.
static inline __m512i to_small_bf16(__m512h x) {
    return _mm512_and_si512(_mm512_srai_epi16((__m512i)x, 3), _mm512_set1_epi16((short)0x8fff));
}

// The first n of 32 places.
static inline __mmask32 first_of(int64_t n) { return n >= 32 ? ~(__mmask32)0 : n <= 0 ? 0 : ((__mmask32)1 << n) - 1; }

// Channels c .. c + 31 of a stored row of d channels, as bfloat16; those past d are zero. whole: none is.
static inline __attribute__((always_inline)) __m512i load_halves(int64_t format, int whole, const uint8_t *row, int64_t d, int64_t c) {
    static const uint16_t NIBBLES[32] = {
        0xc0f0, 0xc0d0, 0xc0b0, 0xc090, 0xc060, 0xc020, 0xbfc0, 0xbf00,  // -7.5 .. -0.5
        0x3f00, 0x3fc0, 0x4020, 0x4060, 0x4090, 0x40b0, 0x40d0, 0x40f0,  // 0.5 .. 7.5
    };
    __mmask32 inside = whole ? ~(__mmask32)0 : first_of(d - c);
    switch (format) {
    case BFLOAT16: return _mm512_maskz_loadu_epi16(inside, row + 2 * c);
    case INT8:
        return to_small_bf16(_mm512_cvtepi16_ph(_mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(inside, row + c))));
    case FP8: {  // the bits of e4m3 in the place of a float16's are the number times 2^-8
        __m512i bits = _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(inside, row + c)), 7);
        bits = _mm512_and_si512(bits, _mm512_set1_epi16((short)0xbf80));
        return to_small_bf16(_mm512_mul_ph((__m512h)bits, _mm512_set1_ph(256)));
    }
    default: {  // int4: channel c and channel c + d / 2 in one byte
        __mmask32 low = whole ? (c < d / 2 ? inside : 0) : first_of(d / 2 - c);
        __m512i codes = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(low, row + c));
        if (!whole || c >= d / 2) {
            __m512i upper = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(inside & ~low, row + c - d / 2));
            codes = _mm512_or_si512(_mm512_and_si512(codes, _mm512_set1_epi16(15)), _mm512_srli_epi16(upper, 4));
        } else codes = _mm512_and_si512(codes, _mm512_set1_epi16(15));
        return _mm512_maskz_permutexvar_epi16(inside, codes, _mm512_loadu_si512(NIBBLES));
    }
    }
}

// All formats and the usual case are constants in each call, so choices are made once and not for every row.
// whole: every position is there, and the channels of a code fill whole registers.
static inline __attribute__((always_inline)) void read_block_of(
    int64_t format, int whole, const struct attention *a, const int64_t *stored, struct halves *h
) {
    int64_t d = a->head_dim, padded = a->vectors * LANES, bytes = d * BITS[format] / 8;
    const uint8_t *k = a->k, *v = a->v;
    int copies_keys = !(format == BFLOAT16 && whole && a->block_size % 16 == 0);
    for (int64_t i = 0; i < BLOCK / 16; i++)
        h->keys[i] = copies_keys ? h->k + i * 16 * padded : (const uint16_t *)(k + stored[i * 16] * bytes);
    for (int64_t j = 0; j < BLOCK; j += 2) {
        const int64_t first = stored[j], second = stored[j + 1];
        for (int64_t c = 0; c < padded; c += 32) {
            __m512i even = {}, odd = {};
            if (whole || first >= 0) {
                even = load_halves(format, whole, v + first * bytes, d, c);
                if (copies_keys)
                    _mm512_storeu_si512(h->k + j * padded + c, load_halves(format, whole, k + first * bytes, d, c));
            }
            if (whole || second >= 0) {
                odd = load_halves(format, whole, v + second * bytes, d, c);
                if (copies_keys)
                    _mm512_storeu_si512(h->k + (j + 1) * padded + c, load_halves(format, whole, k + second * bytes, d, c));
            }
            // Pairs of channels 0 .. 3, 8 .. 11, 16 .. 19 and 24 .. 27, then the others.
            _mm512_storeu_si512(h->v + j * padded + 2 * c, _mm512_unpacklo_epi16(even, odd));
            _mm512_storeu_si512(h->v + j * padded + 2 * c + 32, _mm512_unpackhi_epi16(even, odd));
        }
    }
}

// Keys and values of positions begin .. end - 1 of a row, all in one block, in their places; other values are zero.
static void read_halves(const struct attention *a, int64_t row, int64_t kv_head, int64_t begin, int64_t end, struct halves *h) {
    int64_t stored[BLOCK];
    int whole = end - begin == BLOCK && a->head_dim % (a->cache_format == INT4 ? 64 : 32) == 0;
    if (end - begin < BLOCK)
        for (int64_t j = 0; j < BLOCK; j++) stored[j] = -1;
    for (int64_t at = begin, count; at < end; at += count) {
        int64_t first = stored_row(a, row, kv_head, at, end, &count);
        for (int64_t j = 0; j < count; j++) stored[at % BLOCK + j] = first + j;
    }
#define READ(FORMAT)                                                  \
    case FORMAT:                                                      \
        if (whole) read_block_of(FORMAT, 1, a, stored, h);            \
        else read_block_of(FORMAT, 0, a, stored, h);                  \
        return;
    switch (a->cache_format) { READ(BFLOAT16) READ(INT8) READ(FP8) READ(INT4) }
#undef READ
}

// Keys, values and scales of positions begin .. end - 1 of a row, all in one block.
static void read_block(
    const struct attention *a, int64_t row, int64_t kv_head, int64_t begin, int64_t end, struct ahead *ahead, struct halves *h, struct scales *scales
) {
    int small = has_gain(a->cache_format);
    if (a->k_scale) read_scales(a, row, kv_head, begin, end, small ? GAIN_OUT : 1, small ? GAIN_IN : 1, scales);
    fetch_some(a, ahead);
    read_halves(a, row, kv_head, begin, end, h);
}
#endif

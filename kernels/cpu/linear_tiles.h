// Products with a packed W on the matrix unit.

#pragma once
#include "activation.h"
#include "linear_dots.h"
#include "matrix_unit.h"

#ifdef HAVE_AMX
enum {
    AHEAD = 4,                // products from the one whose weights are being fetched to the one at work
    PANEL = 576,              // channels of 32 tokens and of a chunk that the first cache holds
    KEPT_BYTES = 1024 << 10,  // weights that all tokens meet before the next are read: they stay in the second cache
    KEPT_SUMS = KEPT_BYTES / (CHUNK * 2 * (PANEL + CHUNK)) + 1  // chunks, where channels fill more than a panel
};

// Where a packed chunk has a word of a row, a pair of channels.
static inline int64_t place_in_chunk(int64_t row, int64_t pair) {
    return pair / SIDE * CHUNK * CHUNK + row / SIDE * SIDE * CHUNK + pair % SIDE * CHUNK + row % SIDE * 2;
}

// `rows` rows of W, up to 32, as tiles: out[K / 32][2][16 pairs][16 rows][2]. Rows that are missing are zeros.
static void pack_chunk(const uint16_t *w, int64_t rows, int64_t k, uint16_t *out) {
    for (int64_t c = 0; c < k; c += CHUNK)
        for (int half = 0; half < 2; half++, out += SIDE * CHUNK) {
            __m512i x[SIDE];
            for (int i = 0; i < SIDE; i++) {
                int64_t row = half * SIDE + i;
                x[i] = row < rows ? _mm512_loadu_si512(w + row * k + c) : _mm512_setzero_si512();
            }
            turn_pairs(x);
            for (int i = 0; i < SIDE; i++) _mm512_storeu_si512(out + i * CHUNK, x[i]);
        }
}

// Tiles 0 to 3: sums of 16 tokens and 16 rows of W; 4 and 5: tokens; 6 and 7: rows of W.
static void shape_tiles(int64_t tokens) {
    struct tile_shapes shapes = {.palette = 1};
    int64_t first = min64(tokens, SIDE), second = tokens > SIDE ? tokens - SIDE : 1;
    int64_t rows[8] = {first, first, second, second, first, second, SIDE, SIDE};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = 64;
        shapes.rows[i] = (uint8_t)rows[i];
    }
    load_shapes(&shapes);
}

// 32 channels of tokens meet 32 rows of W: x of the first token, w a product's tiles. near: w is in the second cache, and is
// read past the first, which keeps the tokens.
static inline __attribute__((always_inline)) void multiply_tiles(const uint16_t *x, int64_t stride, const uint16_t *w, int64_t tokens, int near) {
    if (near) _tile_stream_loadd(6, w, 64);
    else _tile_loadd(6, w, 64);
    _tile_loadd(4, x, (size_t)stride * 2);
    _tile_dpbf16ps(0, 4, 6);
    if (near) _tile_stream_loadd(7, w + SIDE * CHUNK, 64);
    else _tile_loadd(7, w + SIDE * CHUNK, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (tokens > SIDE) {
        _tile_loadd(5, x + SIDE * stride, (size_t)stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// Adds to sums[2][2][16 tokens][16 rows] of up to 32 tokens and one chunk of W the products of k channels, or makes them
// where `first`. The chunk is one of tiles at w, or, where w is null, of codes. Tiles are made of those one product ahead, so
// that there is always something to do while others come from memory.
static inline __attribute__((always_inline)) void multiply(
    const struct linear *a, const uint16_t *x, const uint16_t *w, int64_t chunk, int64_t tokens, int64_t k, int first, int near, float *sums
) {
    enum { SUMS = SIDE * SIDE };
    _Alignas(64) uint16_t tiles[2][CHUNK * CHUNK];
    int64_t products = k / CHUNK;
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + SUMS, 64);
        _tile_loadd(2, sums + 2 * SUMS, 64);
        _tile_loadd(3, sums + 3 * SUMS, 64);
    }
    if (!w) widen_product(&a->codes, chunk, 0, tiles[0]);
    for (int64_t i = 0; i < products; i++) {
        const uint16_t *next = w ? w + i * CHUNK * CHUNK : tiles[i % 2];
        for (int j = 0; j < CHUNK * CHUNK && w && !near; j += 32) _mm_prefetch((const char *)(next + AHEAD * CHUNK * CHUNK + j), _MM_HINT_T0);
        if (!w) {
            if (i + 1 < products) widen_product(&a->codes, chunk, i + 1, tiles[(i + 1) % 2]);
            settle(tiles);
        }
        multiply_tiles(x + i * CHUNK, a->x_stride, next, tokens, near);
        if (!w) settle(tiles);  // read before others take their place
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + SUMS, 64);
    if (tokens > SIDE) {
        _tile_stored(2, sums + 2 * SUMS, 64);
        _tile_stored(3, sums + 3 * SUMS, 64);
    }
}

// A chunk of 16 rows of a gate and the 16 of up: sums are rounded once, and so is what becomes of them.
static void write_gated(const struct linear *a, const float *sums, int64_t token, int64_t tokens, int64_t row) {
    for (int64_t t = 0; t < tokens; t++) {
        const float *at = sums + t / SIDE * SIDE * CHUNK + t % SIDE * SIDE;
        __m512 gate = _mm512_cvtpbh_ps(_mm512_cvtneps_pbh(_mm512_loadu_ps(at)));
        __m512 up = _mm512_cvtpbh_ps(_mm512_cvtneps_pbh(_mm512_loadu_ps(at + SIDE * SIDE)));
        store_bf16((uint16_t *)a->out + ((token + t) * a->n + row) / 2, gated_of((vf)gate, (vf)up, (int)a->gelu));
    }
}

static void write_sums(const struct linear *a, const float *sums, int64_t token, int64_t tokens, int64_t row) {
    int64_t rows = min64(CHUNK, a->n - row);
    __mmask32 inside = rows == CHUNK ? ~(__mmask32)0 : ((__mmask32)1 << rows) - 1;
    __m512 bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    if (a->bias) {
        __m512i stored = _mm512_maskz_loadu_epi16(inside, (const uint16_t *)a->bias + row);
        bias[0] = _mm512_cvtpbh_ps((__m256bh)_mm512_castsi512_si256(stored));
        bias[1] = _mm512_cvtpbh_ps((__m256bh)_mm512_extracti64x4_epi64(stored, 1));
    }
    for (int64_t t = 0; t < tokens; t++) {
        const float *at = sums + t / SIDE * SIDE * CHUNK + t % SIDE * SIDE;
        __m512 lower = _mm512_add_ps(_mm512_loadu_ps(at), bias[0]);
        __m512 upper = _mm512_add_ps(_mm512_loadu_ps(at + SIDE * SIDE), bias[1]);
        int64_t place = (token + t) * a->n + row;
        if (a->to_float32) {
            _mm512_mask_storeu_ps((float *)a->out + place, (__mmask16)inside, lower);
            _mm512_mask_storeu_ps((float *)a->out + place + SIDE, (__mmask16)(inside >> SIDE), upper);
        } else _mm512_mask_storeu_epi16((uint16_t *)a->out + place, inside, (__m512i)_mm512_cvtne2ps_pbh(upper, lower));
    }
}

// Chunks of W that all tokens meet before the next. Those of codes are numbers meanwhile.
static int64_t kept_chunks(const struct linear *a) { return KEPT_BYTES / (CHUNK * 2 * a->k) + 1; }
static int keeps_numbers(const struct linear *a) { return a->codes.bits && a->num_tokens > CHUNK; }
static int64_t room_of(const struct linear *a) { return keeps_numbers(a) ? kept_chunks(a) * CHUNK * a->k : 0; }

// Chunks first .. end - 1 of W with all tokens. Channels are taken by the panel: those of a chunk of tokens and of one of W
// fit into the first cache together. numbers: room for those of kept chunks, if they are kept.
static void multiply_chunks(const struct linear *a, const uint16_t *rest, uint16_t *numbers, int64_t first, int64_t end) {
    const uint16_t *packed = a->w;
    _Alignas(64) float sums[KEPT_SUMS * CHUNK * CHUNK];
    int64_t panels = a->num_tokens <= CHUNK ? 1 : (a->k + PANEL - 1) / PANEL;
    int64_t panel = (a->k / CHUNK + panels - 1) / panels * CHUNK;
    int64_t kept = kept_chunks(a), whole = a->n / CHUNK, size = CHUNK * a->k, shaped = 0;
    for (int64_t begin = first; begin < end; begin += kept) {
        int64_t behind = min64(begin + kept, end);
        for (int64_t chunk = begin; keeps_numbers(a) && chunk < min64(behind, whole); chunk++)
            widen_chunk(&a->codes, chunk, numbers + (chunk - begin) * size);
        settle(numbers);
        for (int64_t token = 0; token < a->num_tokens; token += CHUNK) {
            int64_t tokens = min64(CHUNK, a->num_tokens - token);
            if (tokens != shaped) shape_tiles(tokens);
            shaped = tokens;
            for (int64_t c = 0; c < a->k; c += panel)
                for (int64_t chunk = begin; chunk < behind; chunk++) {
                    const uint16_t *x = (const uint16_t *)a->x + token * a->x_stride + c, *w = NULL;
                    if (chunk == whole) w = rest;
                    else if (keeps_numbers(a)) w = numbers + (chunk - begin) * size;
                    else if (!a->codes.bits) w = packed + chunk * size;
                    int64_t channels = min64(panel, a->k - c), last = c + panel >= a->k;
                    float *at = sums + (panels > 1 ? (chunk - begin) * CHUNK * CHUNK : 0);
                    if (!w) multiply(a, x, NULL, chunk, tokens, channels, 1, 0, at);
                    else if (token > 0) multiply(a, x, w + c * CHUNK, chunk, tokens, channels, c == 0, 1, at);
                    else multiply(a, x, w + c * CHUNK, chunk, tokens, channels, c == 0, 0, at);
                    if (last && a->gated) write_gated(a, at, token, tokens, chunk * CHUNK);
                    else if (last) write_sums(a, at, token, tokens, chunk * CHUNK);
                }
        }
    }
    _tile_release();
}
#endif

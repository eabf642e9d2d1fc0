// Products with a packed W on the matrix unit.

#pragma once
#include "activation.h"
#include "linear_dots.h"
#include "matrix_unit.h"

#ifdef HAVE_AMX
enum {
    AHEAD = 4,                // products from the one whose weights are being fetched to the one at work
    PANEL = 576,              // channels of 32 tokens and of a chunk that the first cache holds
    FEW_GROUPS = 8,           // of 32 tokens, that meet weights by the chunk
    IN_ROW = 12,              // chunks that a thread takes at least, so that it mostly finds fetched what it wants next
    KEPT_BYTES = 512 << 10,   // weights that all of more tokens meet before the next: the second cache has these and the next
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

// What is done beside products, while the matrix unit is busy.
struct beside {
    const char *at, *end;  // weights that the second cache is to have next
    int64_t lines;         // cache lines of them with each product
    const float *sums;     // of a chunk of W and some tokens, that wait to be written
    int64_t row, token, tokens, written;  // first row of that chunk; first of those tokens, how many, how many are written
};

static inline void fetch_lines(struct beside *b) {
    const char *stop = b->at + 64 * b->lines;
    if (stop > b->end) stop = b->end;
    for (; b->at < stop; b->at += 64) _mm_prefetch(b->at, _MM_HINT_T1);
}

// 16 rows of a gate and the 16 of up: sums are rounded once, and so is what becomes of them.
static inline void write_gated(const struct linear *a, __m512 gate, __m512 up, int64_t place) {
    gate = _mm512_cvtpbh_ps(_mm512_cvtneps_pbh(gate));
    up = _mm512_cvtpbh_ps(_mm512_cvtneps_pbh(up));
    store_bf16((uint16_t *)a->out + place / 2, gated_of((vf)gate, (vf)up, (int)a->gelu));
}

static inline void write_sums(const struct linear *a, __m512 lower, __m512 upper, int64_t row, int64_t place) {
    int64_t rows = min64(CHUNK, a->n - row);
    __mmask32 inside = rows == CHUNK ? ~(__mmask32)0 : ((__mmask32)1 << rows) - 1;
    if (a->bias) {
        __m512i stored = _mm512_maskz_loadu_epi16(inside, (const uint16_t *)a->bias + row);
        lower = _mm512_add_ps(lower, _mm512_cvtpbh_ps((__m256bh)_mm512_castsi512_si256(stored)));
        upper = _mm512_add_ps(upper, _mm512_cvtpbh_ps((__m256bh)_mm512_extracti64x4_epi64(stored, 1)));
    }
    if (a->to_float32) {
        _mm512_mask_storeu_ps((float *)a->out + place, (__mmask16)inside, lower);
        _mm512_mask_storeu_ps((float *)a->out + place + SIDE, (__mmask16)(inside >> SIDE), upper);
    } else _mm512_mask_storeu_epi16((uint16_t *)a->out + place, inside, (__m512i)_mm512_cvtne2ps_pbh(upper, lower));
}

// Writes up to `count` of the tokens that wait.
static void write_some(const struct linear *a, struct beside *b, int64_t count) {
    for (int64_t stop = min64(b->written + count, b->tokens); b->written < stop; b->written++) {
        const float *at = b->sums + b->written / SIDE * SIDE * CHUNK + b->written % SIDE * SIDE;
        __m512 lower = _mm512_loadu_ps(at), upper = _mm512_loadu_ps(at + SIDE * SIDE);
        int64_t place = (b->token + b->written) * a->n + b->row;
        if (a->gated) write_gated(a, lower, upper, place);
        else write_sums(a, lower, upper, b->row, place);
    }
}

// Adds to sums[2][2][16 tokens][16 rows] of up to 32 tokens and one chunk of W the products of k channels, or makes them
// where `first`. The chunk is one of tiles at w, or, where w is null, of codes. Tiles are made of those one product ahead, so
// that there is always something to do while others come from memory. What waits beside is written before sums are.
static inline __attribute__((always_inline)) void multiply(
    const struct linear *a, const uint16_t *x, const uint16_t *w, int64_t chunk, int64_t tokens, int64_t k, int first, int near, struct beside *beside, float *sums
) {
    enum { SUMS = SIDE * SIDE };
    _Alignas(64) uint16_t tiles[2][CHUNK * CHUNK];
    int64_t products = k / CHUNK, writes = (CHUNK + products - 1) / products;
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
        fetch_lines(beside);
        write_some(a, beside, writes);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + SUMS, 64);
    if (tokens > SIDE) {
        _tile_stored(2, sums + 2 * SUMS, 64);
        _tile_stored(3, sums + 3 * SUMS, 64);
    }
}

// Chunks of W that all tokens meet before the next. Those of codes are numbers meanwhile.
static int64_t kept_chunks(const struct linear *a) {
    return a->num_tokens <= FEW_GROUPS * CHUNK ? 1 : KEPT_BYTES / (CHUNK * 2 * a->k) + 1;
}
static int64_t chunks_of_part(const struct linear *a) { return max64(kept_chunks(a), IN_ROW); }
static int keeps_numbers(const struct linear *a) { return a->codes.bits && a->num_tokens > CHUNK; }
static int64_t room_of(const struct linear *a) { return keeps_numbers(a) ? kept_chunks(a) * CHUNK * a->k : 0; }

// Chunks first .. end - 1 of W with all tokens. Channels are taken by the panel: those of a chunk of tokens and of one of W
// fit into the first cache together. numbers: room for those of kept chunks, if they are kept.
static void multiply_chunks(const struct linear *a, const uint16_t *rest, uint16_t *numbers, int64_t first, int64_t end) {
    const uint16_t *packed = a->w;
    _Alignas(64) float sums[KEPT_SUMS * CHUNK * CHUNK];
    int64_t panels = a->num_tokens <= CHUNK ? 1 : (a->k + PANEL - 1) / PANEL;
    int64_t panel = (a->k / CHUNK + panels - 1) / panels * CHUNK;
    int64_t groups = (a->num_tokens + CHUNK - 1) / CHUNK;
    struct beside beside = {.lines = (CHUNK + groups - 1) / groups};
    int64_t kept = kept_chunks(a), whole = a->n / CHUNK, size = CHUNK * a->k, shaped = 0;
    for (int64_t begin = first; begin < end; begin += kept) {
        int64_t behind = min64(begin + kept, end);
        if (!a->codes.bits) {
            beside.at = (const char *)(packed + behind * size);
            beside.end = (const char *)(packed + min64(min64(behind + kept, end), whole) * size);
        }
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
                    if (!w) multiply(a, x, NULL, chunk, tokens, channels, 1, 0, &beside, at);
                    else if (token > 0) multiply(a, x, w + c * CHUNK, chunk, tokens, channels, c == 0, 1, &beside, at);
                    else multiply(a, x, w + c * CHUNK, chunk, tokens, channels, c == 0, 0, &beside, at);
                    if (last) beside = (struct beside){beside.at, beside.end, beside.lines, at, chunk * CHUNK, token, tokens, 0};
                }
        }
    }
    _tile_release();
    write_some(a, &beside, CHUNK);
}
#endif

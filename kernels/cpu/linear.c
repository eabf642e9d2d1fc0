// Products with a weight matrix: x W^T + bias, float32 sums. Formulas: kernels/linear_ops.py.
//
// Threads share out the rows of W, [N, K], and read them once for all tokens of a small step: that is what the memory can
// give, and more is not to be had. Each sum takes the channels in one order, so a token's outputs have the same bits alone
// and in any batch, and with any number of threads. linear_dots.h: in vectors, of a plain W. Here: on the matrix unit, of
// a W in bfloat16 that is packed where it lies, so that it needs no second place. Each 32 of its rows become, for each 32
// channels, two tiles of 16 pairs of channels by 16 rows, as the unit reads its second operand (amx.h). Rows past the last
// whole 32 stay as they are, and are packed again in every call. A W that is kept as codes (linear_codes.h) becomes numbers
// a few rows at a time, just before they are multiplied: they are in the cache then, and only codes come from memory.

#include <omp.h>
#include <stdlib.h>

#include "linear_dots.h"
#include "matrix_unit.h"

#ifdef HAVE_AMX
enum {
    SIDE = 16,              // rows of a tile
    CHUNK = 2 * SIDE,       // rows of W, tokens, or channels of a product of four tiles
    AHEAD = 4,              // products from the one whose weights are being fetched to the one at work
    KEPT_BYTES = 512 << 10  // weights that all tokens meet before the next are read: they stay in the second cache
};

// Rows become columns: 16 registers of 16 32-bit numbers.
static inline void turn(__m512i *x) {
    __m512i y[SIDE];
    for (int i = 0; i < 8; i++) {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        x[4 * i] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
        x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
        x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
        x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {  // 0x88 and 0xdd: the even and the odd quarters of two registers
        y[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
        y[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
        y[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
        y[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88);
        x[4 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0x88);
        x[8 + i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd);
        x[12 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0xdd);
    }
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
            turn(x);
            for (int i = 0; i < SIDE; i++) _mm512_storeu_si512(out + i * CHUNK, x[i]);
        }
}

// Tiles 0 to 3: sums of 16 tokens and 16 rows of W; 4 and 5: tokens; 6 and 7: rows of W.
static void shape_tiles(int64_t tokens) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    int64_t first = min64(tokens, SIDE), second = tokens > SIDE ? tokens - SIDE : 1;
    int64_t rows[8] = {first, first, second, second, first, second, SIDE, SIDE};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = 64;
        shapes.rows[i] = (uint8_t)rows[i];
    }
    _tile_loadconfig(&shapes);
}

// 32 channels of tokens meet 32 rows of W: x of the first token, w a product's tiles.
static inline __attribute__((always_inline)) void multiply_tiles(const uint16_t *x, int64_t stride, const uint16_t *w, int64_t tokens) {
    _tile_loadd(6, w, 64);
    _tile_loadd(4, x, (size_t)stride * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + SIDE * CHUNK, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (tokens > SIDE) {
        _tile_loadd(5, x + SIDE * stride, (size_t)stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// sums[token][row] of up to 32 tokens and one chunk of W: of tiles at w, or, where w is null, of a chunk of codes. Tiles are
// made of those one product ahead, so that there is always something to do while others come from memory.
static void multiply(
    const struct linear *a, const uint16_t *x, const uint16_t *w, int64_t chunk, int64_t tokens, float *sums
) {
    _Alignas(64) uint16_t tiles[2][CHUNK * CHUNK];
    int64_t products = a->k / CHUNK;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (!w) widen_product(&a->codes, chunk, 0, tiles[0]);
    for (int64_t i = 0; i < products; i++) {
        const uint16_t *next = w ? w + i * CHUNK * CHUNK : tiles[i % 2];
        if (w)
            for (int j = 0; j < CHUNK * CHUNK; j += 32) _mm_prefetch((const char *)(next + AHEAD * CHUNK * CHUNK + j), _MM_HINT_T0);
        else if (i + 1 < products) widen_product(&a->codes, chunk, i + 1, tiles[(i + 1) % 2]);
        multiply_tiles(x + i * CHUNK, a->x_stride, next, tokens);
    }
    _tile_stored(0, sums, CHUNK * 4);
    _tile_stored(1, sums + SIDE, CHUNK * 4);
    if (tokens > SIDE) {
        _tile_stored(2, sums + SIDE * CHUNK, CHUNK * 4);
        _tile_stored(3, sums + SIDE * CHUNK + SIDE, CHUNK * 4);
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
    for (int64_t t = 0; t < tokens; t++, sums += CHUNK) {
        __m512 lower = _mm512_add_ps(_mm512_loadu_ps(sums), bias[0]);
        __m512 upper = _mm512_add_ps(_mm512_loadu_ps(sums + SIDE), bias[1]);
        int64_t at = (token + t) * a->n + row;
        if (a->to_float32) {
            _mm512_mask_storeu_ps((float *)a->out + at, (__mmask16)inside, lower);
            _mm512_mask_storeu_ps((float *)a->out + at + SIDE, (__mmask16)(inside >> SIDE), upper);
        } else _mm512_mask_storeu_epi16((uint16_t *)a->out + at, inside, (__m512i)_mm512_cvtne2ps_pbh(upper, lower));
    }
}

// Chunks of W that all tokens meet before the next. Those of codes are numbers meanwhile.
static int64_t kept_chunks(const struct linear *a) { return KEPT_BYTES / (CHUNK * 2 * a->k) + 1; }
static int keeps_numbers(const struct linear *a) { return a->codes.bits && a->num_tokens > CHUNK; }

// Chunks first .. end - 1 of W with all tokens. numbers: room for those of kept chunks, if they are kept.
static void multiply_chunks(const struct linear *a, const uint16_t *rest, uint16_t *numbers, int64_t first, int64_t end) {
    const uint16_t *x = a->x, *packed = a->w;
    _Alignas(64) float sums[CHUNK * CHUNK];
    int64_t kept = kept_chunks(a), whole = a->n / CHUNK, size = CHUNK * a->k, shaped = 0;
    for (int64_t begin = first; begin < end; begin += kept) {
        for (int64_t chunk = begin; keeps_numbers(a) && chunk < min64(min64(begin + kept, end), whole); chunk++)
            widen_chunk(&a->codes, chunk, numbers + (chunk - begin) * size);
        for (int64_t token = 0; token < a->num_tokens; token += CHUNK) {
            int64_t tokens = min64(CHUNK, a->num_tokens - token);
            if (tokens != shaped) shape_tiles(tokens);
            shaped = tokens;
            for (int64_t chunk = begin; chunk < min64(begin + kept, end); chunk++) {
                const uint16_t *w = NULL;
                if (chunk == whole) w = rest;
                else if (keeps_numbers(a)) w = numbers + (chunk - begin) * size;
                else if (!a->codes.bits) w = packed + chunk * size;
                multiply(a, x + token * a->x_stride, w, chunk, tokens, sums);
                write_sums(a, sums, token, tokens, chunk * CHUNK);
            }
        }
    }
    _tile_release();
}
#endif

// Whether weights may be packed.
int linear_packs(void) {
#ifdef HAVE_AMX
    return tiles_granted();
#else
    return 0;
#endif
}

// W [n, k] in place; k is a multiple of 32. Returns 1 for want of memory.
int linear_pack(uint16_t *w, int64_t n, int64_t k) {
#ifdef HAVE_AMX
    uint16_t *packed = malloc((size_t)(CHUNK * k) * 2);
    if (!packed) return 1;
    for (int64_t row = 0; row + CHUNK <= n; row += CHUNK) {
        pack_chunk(w + row * k, CHUNK, k, packed);
        memcpy(w + row * k, packed, (size_t)(CHUNK * k) * 2);
    }
    free(packed);
#endif
    return 0;
}

// Codes of n rows of W, in place. Returns 1 for want of memory.
int linear_pack_codes(const struct codes *w, int64_t n) {
#ifdef HAVE_AMX
    return pack_codes(w, n);
#else
    return 0;
#endif
}

struct rows {
    const void *w;
    const int64_t *ids;
    void *out;
    int64_t num_ids, first_row, whole, n, k, number_bytes, packed, format;  // whole: W has all rows that there are
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
    for (int64_t i = 0; i < a->num_ids; i++) {
        uint8_t *out = (uint8_t *)a->out + i * row_bytes;
        int64_t row = a->ids[i] - a->first_row;
        if (row < 0 || row >= a->n) {
            if (a->whole) return 2;
            memset(out, 0, (size_t)row_bytes);
            continue;
        }
        int packed = a->packed && row < a->n / 32 * 32;
        if (a->codes.bits) widen_row_of(&a->codes, row, packed, a->format, out);
#ifdef HAVE_AMX
        else if (packed) {
            int64_t chunk = row / CHUNK, in_chunk = row % CHUNK;
            const uint16_t *pairs = (const uint16_t *)a->w + chunk * CHUNK * a->k;
            pairs += in_chunk / SIDE * SIDE * CHUNK + in_chunk % SIDE * 2;
            for (int64_t pair = 0; pair < a->k / 2; pair++)
                memcpy(out + 4 * pair, pairs + pair / SIDE * CHUNK * CHUNK + pair % SIDE * CHUNK, 4);
        }
#endif
        else memcpy(out, (const uint8_t *)a->w + row * row_bytes, (size_t)row_bytes);
        if (a->scale != 1) scale_numbers(a, out);
    }
    return 0;
}

// Of a packed W. Returns 1 for want of memory.
int linear_packed(const struct linear *a) {
#ifdef HAVE_AMX
    int64_t chunks = (a->n + CHUNK - 1) / CHUNK, whole = a->n / CHUNK, threads = a->num_threads, size = CHUNK * a->k;
    int64_t numbers = keeps_numbers(a) ? kept_chunks(a) * size : 0, last = whole < chunks ? 2 * size : 0;
    uint16_t *room = last + numbers ? aligned_alloc(64, (size_t)(last + threads * numbers) * 2) : NULL, *rest = room;
    if (last + numbers && !room) return 1;
    if (last) {
        const uint16_t *rows = (const uint16_t *)a->w + whole * size;
        if (a->codes.bits) {
            for (int64_t row = whole * CHUNK; row < a->n; row++)
                widen_row_of(&a->codes, row, 0, BFLOAT16, rest + size + row % CHUNK * a->k);
            rows = rest + size;
        }
        pack_chunk(rows, a->n - whole * CHUNK, a->k, rest);
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        multiply_chunks(a, rest, room + last + me * numbers, chunks * me / all, chunks * (me + 1) / all);
    }
    free(room);
#endif
    return 0;
}

// Of a plain W. Returns 1 for want of memory.
int linear_plain(const struct linear *a) {
    int64_t padded = (a->k + LANES - 1) / LANES * LANES, groups = (a->n + ROWS - 1) / ROWS, threads = a->num_threads;
    int64_t row_bytes = a->k * (a->format == FLOAT32 ? 4 : 2), widened = a->codes.bits ? ROWS * row_bytes : 0;
    float *x = malloc((size_t)(a->num_tokens * padded * 4 + threads * widened) + 1);
    if (!x) return 1;
    for (int64_t t = 0; t < a->num_tokens; t++) widen_row(a, t, padded, x + t * padded);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        int64_t first = groups * me / all * ROWS, end = min64(groups * (me + 1) / all * ROWS, a->n);
        uint8_t *rows = (uint8_t *)(x + a->num_tokens * padded) + me * widened;
        if (!a->codes.bits) dots(a, x, padded, (const uint8_t *)a->w + first * row_bytes, first, end);
        else for (int64_t row = first; row < end; row += ROWS) {
            int64_t after = min64(row + ROWS, end);
            for (int64_t i = row; i < after; i++) widen_row_of(&a->codes, i, 0, a->format, rows + (i - row) * row_bytes);
            dots(a, x, padded, rows, row, after);
        }
    }
    free(x);
    return 0;
}

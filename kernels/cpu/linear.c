// Products with a weight matrix: x W^T + bias, float32 sums. Formulas: kernels/linear_ops.py.
//
// Threads share out the rows of W, [N, K], and read them once for all tokens of a small step: that is what the memory can
// give, and more is not to be had. Each sum takes the channels in one order, so a token's outputs have the same bits alone
// and in any batch, and with any number of threads. linear_dots.h: in vectors, of a plain W. Here: on the matrix unit, of
// a W in bfloat16 that is packed where it lies, so that it needs no second place. Each 32 of its rows become, for each 32
// channels, two tiles of 16 pairs of channels by 16 rows, as the unit reads its second operand (amx.h). Rows past the last
// whole 32 stay as they are, and are packed again in every call. A W that is kept as codes (linear_codes.h) becomes numbers
// just before they are multiplied, for few tokens one product ahead and for many 1 MiB at a time: they are in the cache then,
// and only codes come from memory.

#include <stdlib.h>

#include "activation.h"
#include "linear_dots.h"
#include "linear_rows.h"
#include "matrix_unit.h"
#include "pool.h"

enum { PARTS = 2 };  // of a small product, for each thread

#ifdef HAVE_AMX
enum {
    AHEAD = 4,                // products from the one whose weights are being fetched to the one at work
    PANEL = 576,              // channels of 32 tokens and of a chunk that the first cache holds
    KEPT_BYTES = 1024 << 10,  // weights that all tokens meet before the next are read: they stay in the second cache
    KEPT_SUMS = KEPT_BYTES / (CHUNK * 2 * (PANEL + CHUNK)) + 1  // chunks, where channels fill more than a panel
};

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

// Parts of W that threads take in turn. More than one a thread, so that one that comes late does less.
struct product {
    const struct linear *a;
    const uint16_t *rest;
    uint16_t *numbers;
    int64_t numbers_size, chunks, parts;
};

static void multiply_part(const void *context, int64_t part, int64_t thread) {
    const struct product *p = context;
    uint16_t *numbers = p->numbers + thread * p->numbers_size;
    multiply_chunks(p->a, p->rest, numbers, part_start(p->chunks, part, p->parts), part_start(p->chunks, part + 1, p->parts));
}

static int64_t parts_of(const struct linear *a, int64_t chunks) {
    int64_t threads = a->num_threads, kept = threads * kept_chunks(a);
    if (threads == 1) return 1;
    return threads * (a->num_tokens > CHUNK ? (chunks + kept - 1) / kept : PARTS);
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
    struct product product = {a, rest, room + last, numbers, chunks, min64(parts_of(a, chunks), chunks)};
    kvshard_share_out(multiply_part, &product, product.parts, threads);
    free(room);
#endif
    return 0;
}

struct plain_product {
    const struct linear *a;
    const float *x;
    uint8_t *room;  // for rows that a thread has widened
    int64_t padded, row_bytes, room_bytes, parts;
};

static void multiply_plain_part(const void *context, int64_t part, int64_t thread) {
    const struct plain_product *p = context;
    const struct linear *a = p->a;
    int64_t groups = (a->n + ROWS - 1) / ROWS, first = part_start(groups, part, p->parts) * ROWS;
    int64_t end = min64(part_start(groups, part + 1, p->parts) * ROWS, a->n);
    uint8_t *rows = p->room + thread * p->room_bytes;
    if (!a->codes.bits) dots(a, p->x, p->padded, (const uint8_t *)a->w + first * p->row_bytes, first, end);
    else for (int64_t row = first; row < end; row += ROWS) {
        int64_t after = min64(row + ROWS, end);
        for (int64_t i = row; i < after; i++) widen_row_of(&a->codes, i, 0, a->format, rows + (i - row) * p->row_bytes);
        dots(a, p->x, p->padded, rows, row, after);
    }
}

// Of a plain W. Returns 1 for want of memory.
int linear_plain(const struct linear *a) {
    int64_t padded = (a->k + LANES - 1) / LANES * LANES, threads = a->num_threads;
    int64_t row_bytes = a->k * (a->format == FLOAT32 ? 4 : 2), widened = a->codes.bits ? ROWS * row_bytes : 0;
    float *x = malloc((size_t)(a->num_tokens * padded * 4 + threads * widened) + 1);
    if (!x) return 1;
    for (int64_t t = 0; t < a->num_tokens; t++) widen_row(a, t, padded, x + t * padded);
    struct plain_product product = {a, x, (uint8_t *)(x + a->num_tokens * padded), padded, row_bytes, widened, threads * PARTS};
    kvshard_share_out(multiply_plain_part, &product, product.parts, threads);
    free(x);
    return 0;
}

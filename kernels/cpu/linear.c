// Products with a weight matrix: x W^T + bias, float32 sums. Formulas: kernels/linear_ops.py.
//
// Threads share out the rows of W, [N, K], and read them once for all tokens of a small step: that is what the memory can
// give, and more is not to be had. Each sum takes the channels in one order, so a token's outputs have the same bits alone
// and in any batch, and with any number of threads. linear_dots.h: in vectors, of a plain W. linear_tiles.h: on the matrix
// unit, of a W in bfloat16 that is packed where it lies, so that it needs no second place. Each 32 of its rows become, for
// each 32 channels, two tiles of 16 pairs of channels by 16 rows, as the unit reads its second operand (amx.h).
// linear_lanes.h: in vectors of rows, of a W in float32 or bfloat16 whose every 32 rows lie word by word. Rows past the last
// whole 32 stay as they are, and are packed again in every call. A W that is kept as codes (linear_codes.h) becomes numbers
// just before they are multiplied: they are in a cache or a register then, and only codes come from memory.

#include <stdlib.h>

#include "linear_dots.h"
#include "linear_lanes.h"
#include "linear_rows.h"
#include "linear_tiles.h"
#include "pool.h"

enum { PARTS = 2 };  // of a small product, for each thread

#ifdef PACKS
// Parts of W that threads take in turn. More than one a thread, so that one that comes late does less.
struct product {
    const struct linear *a;
    const uint16_t *rest;
    uint16_t *room;  // of each thread
    int64_t room_size, chunks, parts;
};

static void multiply_part(const void *context, int64_t part, int64_t thread) {
    const struct product *p = context;
    uint16_t *room = p->room + thread * p->room_size;
    multiply_chunks(p->a, p->rest, room, part_start(p->chunks, part, p->parts), part_start(p->chunks, part + 1, p->parts));
}

static int64_t parts_of(const struct linear *a, int64_t chunks) {
    int64_t threads = a->num_threads, at_once = threads * chunks_of_part(a);
    if (threads == 1) return 1;
    return threads * (a->num_tokens > CHUNK ? (chunks + at_once - 1) / at_once : PARTS);
}

static void multiply_all(struct product *p) {
    p->parts = min64(parts_of(p->a, p->chunks), p->chunks);
    kvshard_share_out(multiply_part, p, p->parts, p->a->num_threads);
}

#ifdef HAVE_LANES
static void multiply_turned(struct product *p, float *turned) {
    const struct linear *a = p->a;
    for (int64_t first = 0; first < a->num_tokens; first += TURNED) {
        struct turning turning = {a, first, min64(TURNED, a->num_tokens - first), turned};
        kvshard_share_out(turn_block, &turning, (turning.count + MOST - 1) / MOST, a->num_threads);
        struct linear some = product_of(&turning);
        p->a = &some;
        multiply_all(p);
    }
}
#endif
#endif

// Whether weights of a format may be packed.
int linear_packs(int64_t format) {
#if defined(HAVE_AMX)
    return format == BFLOAT16 && tiles_granted();
#elif defined(HAVE_LANES)
    return format == BFLOAT16 || format == FLOAT32;
#else
    return 0;
#endif
}

// n rows of W in place, each `halves` times 16 bits; halves is a multiple of 32. Returns 1 for want of memory.
int linear_pack(uint16_t *w, int64_t n, int64_t halves) {
#ifdef PACKS
    uint16_t *packed = malloc((size_t)(CHUNK * halves) * 2);
    if (!packed) return 1;
    for (int64_t row = 0; row + CHUNK <= n; row += CHUNK) {
        pack_chunk(w + row * halves, CHUNK, halves, packed);
        memcpy(w + row * halves, packed, (size_t)(CHUNK * halves) * 2);
    }
    free(packed);
#endif
    return 0;
}

// Codes of n rows of W, in place. Returns 1 for want of memory.
int linear_pack_codes(const struct codes *w, int64_t n) {
#ifdef PACKS
    return pack_codes(w, n);
#else
    return 0;
#endif
}

// Of a packed W. Returns 1 for want of memory.
int linear_packed(const struct linear *a) {
#ifdef PACKS
    int64_t chunks = (a->n + CHUNK - 1) / CHUNK, whole = a->n / CHUNK, threads = a->num_threads;
    int64_t halves = row_halves(a), size = CHUNK * halves;
    int64_t each = room_of(a), last = whole < chunks ? 2 * size : 0, turned = 0;
#ifdef HAVE_LANES
    turned = 2 * turned_room(a);
#endif
    uint16_t *room = aligned_alloc(64, (size_t)(last + threads * each + turned) * 2 / 64 * 64 + 64), *rest = room;
    if (!room) return 1;
    if (last) {
        const uint16_t *rows = (const uint16_t *)a->w + whole * size;
        if (a->codes.bits) {
            for (int64_t row = whole * CHUNK; row < a->n; row++)
                widen_row_of(&a->codes, row, 0, format_of_weights(a), rest + size + row % CHUNK * halves);
            rows = rest + size;
        }
        pack_chunk(rows, a->n - whole * CHUNK, halves, rest);
    }
    struct product product = {a, rest, room + last, each, chunks, 0};
#ifdef HAVE_LANES
    multiply_turned(&product, (float *)(room + last + threads * each));
#else
    multiply_all(&product);
#endif
    free(room);
#endif
    return 0;
}

struct plain_product {
    const struct linear *a;
    uint8_t *room;  // of each thread: for tokens, then for rows that it has widened
    int64_t padded, row_bytes, rows, tokens, room_bytes, parts;  // rows and tokens: at a time
};

static void multiply_plain_part(const void *context, int64_t part, int64_t thread) {
    const struct plain_product *p = context;
    const struct linear *a = p->a;
    int64_t groups = (a->n + ROWS - 1) / ROWS, first = part_start(groups, part, p->parts) * ROWS;
    int64_t end = min64(part_start(groups, part + 1, p->parts) * ROWS, a->n);
    float *x = (float *)(p->room + thread * p->room_bytes);
    uint8_t *widened = (uint8_t *)(x + p->tokens * p->padded);
    for (int64_t row = first; row < end; row += p->rows) {
        struct meeting m = {(const uint8_t *)a->w + row * p->row_bytes, row, min64(row + p->rows, end), x, p->padded, 0, 0};
        if (a->codes.bits) {
            for (int64_t i = row; i < m.end; i++) widen_row_of(&a->codes, i, 0, a->format, widened + (i - row) * p->row_bytes);
            m.stored = widened;
        }
        for (; m.token < a->num_tokens; m.token += m.count) {
            m.count = min64(p->tokens, a->num_tokens - m.token);
            for (int64_t t = 0; t < m.count; t++) widen_token(a, m.token + t, p->padded, x + t * p->padded);
            dots(a, &m);
        }
    }
}

// Of a plain W. Returns 1 for want of memory.
int linear_plain(const struct linear *a) {
    struct plain_product p = {a, .padded = (a->k + LANES - 1) / LANES * LANES, .parts = a->num_threads * PARTS};
    p.row_bytes = a->k * (a->format == FLOAT32 ? 4 : 2);
    p.rows = max64(1, KEPT_ROWS / max64(1, p.row_bytes) / ROWS) * ROWS;
    p.tokens = max64(1, KEPT_TOKENS / max64(1, p.padded * 4) / TOKENS) * TOKENS;
    p.room_bytes = (p.tokens * p.padded * 4 + (a->codes.bits ? p.rows * p.row_bytes : 0) + 63) / 64 * 64;
    p.room = malloc((size_t)(a->num_threads * p.room_bytes) + 1);
    if (!p.room) return 1;
    kvshard_share_out(multiply_plain_part, &p, p.parts, a->num_threads);
    free(p.room);
    return 0;
}

// Products with a packed W in vectors of 8 rows, for processors with AVX2 and neither a matrix unit nor AVX-512 (torch's
// products in bfloat16 need one of them to be fast).
//
// The lanes of a sum are rows, so nothing is left to add up at the end, and six tokens share what is read of W. A word of W
// holds two channels of a row: shifted it is the even one in float32, masked the odd one.

#pragma once
#include "activation.h"
#include "linear_dots.h"

#if LANES == 8 && defined(__AVX2__) && defined(__FMA__)
#define HAVE_LANES 1

enum {
    AT_ONCE = 6,             // tokens whose sums fit the registers, of 16 rows
    MOST = 8 * AT_ONCE,      // tokens of a block
    BLOCK_BYTES = 224 << 10  // of them in float32, which stay in the second cache
};

static inline vu pairs_of(const uint16_t *w) {
    vu pairs;
    memcpy(&pairs, w, sizeof pairs);
    return pairs;
}

// Rows become columns.
static inline void turn_words(vu x[LANES]) {
    vi lane = lanes();
    _Pragma("GCC unroll 4") for (int w = 1; w < LANES; w *= 2) {
        vi second = (lane & w) != 0;
        for (int i = 0; i < LANES; i++) {
            if (i & w) continue;
            vu a = x[i], b = x[i + w];
            x[i] = __builtin_shuffle(a, b, lane + (second & (LANES - w)));
            x[i + w] = __builtin_shuffle(a, b, lane + (second & LANES) + (~second & w));
        }
    }
}

// Where a packed chunk has a pair of channels of a row.
static inline int64_t place_in_chunk(int64_t row, int64_t pair) { return (pair * CHUNK + row) * 2; }

// `rows` rows of W, up to 32, as pairs of channels: out[K / 2][32 rows][2], which is read from its beginning to its end.
// Rows that are missing are zeros.
static void pack_chunk(const uint16_t *w, int64_t rows, int64_t k, uint16_t *out) {
    for (int64_t c = 0; c < k; c += 2 * LANES, out += LANES * 2 * CHUNK)
        for (int64_t row = 0; row < CHUNK; row += LANES) {
            vu x[LANES] = {};
            for (int64_t i = 0; i < min64(LANES, rows - row); i++) x[i] = pairs_of(w + (row + i) * k + c);
            turn_words(x);
            for (int64_t i = 0; i < LANES; i++) memcpy(out + place_in_chunk(row, i), &x[i], sizeof x[i]);
        }
}

// Sums of `T` tokens, the last ones repeated where there are fewer, and the rows of V vectors: out[rows / 16][MOST][16].
// Channels are taken one by one, so a sum is the same in any of these. Unrolled, or with words of W read once and kept, GCC
// would run out of registers. next: half a chunk that is brought to the second cache meanwhile. One and two tokens are done
// sooner than it comes, and the processor itself reads ahead.
#define DEFINE_LANES(NAME, T, V)                                                                                        \
    static void NAME(const uint16_t *w, const float *x, int64_t k, int64_t count, const uint16_t *next, float *out) {   \
        const float *in[T];                                                                                             \
        vf sums[T][V] = {};                                                                                             \
        for (int64_t t = 0; t < T; t++) in[t] = x + min64(t, count - 1) * k;                                            \
        _Pragma("GCC unroll 1") for (int64_t c = 0; c < k; c += 2, w += 2 * CHUNK) {                                    \
            vf weights[V];                                                                                              \
            if (T > 2) __builtin_prefetch(next + c * SIDE, 0, 2);                                                       \
            _Pragma("GCC unroll 4") for (int i = 0; i < V; i++) weights[i] = (vf)(pairs_of(w + i * 2 * LANES) << 16);   \
            _Pragma("GCC unroll 6") for (int t = 0; t < T; t++)                                                         \
                _Pragma("GCC unroll 4") for (int i = 0; i < V; i++) sums[t][i] += weights[i] * splat(in[t][c]);         \
            _Pragma("GCC unroll 4") for (int i = 0; i < V; i++)                                                         \
                weights[i] = (vf)(pairs_of(w + i * 2 * LANES) & 0xffff0000);                                            \
            _Pragma("GCC unroll 6") for (int t = 0; t < T; t++)                                                         \
                _Pragma("GCC unroll 4") for (int i = 0; i < V; i++) sums[t][i] += weights[i] * splat(in[t][c + 1]);     \
        }                                                                                                               \
        for (int64_t t = 0; t < min64(T, count); t++)                                                                   \
            for (int64_t i = 0; i < V; i++) store(out + (i / 2 * MOST + t) * SIDE + i % 2 * LANES, sums[t][i]);         \
    }
DEFINE_LANES(lanes_of_one, 1, 4)
DEFINE_LANES(lanes_of_two, 2, 4)
DEFINE_LANES(lanes_of_four, 4, 2)
DEFINE_LANES(lanes_of_six, AT_ONCE, 2)

// A block of tokens and a chunk: sums[2][MOST][16 rows].
static void multiply_lanes(const uint16_t *w, const float *x, int64_t k, int64_t tokens, float *sums) {
    int64_t rest = tokens % AT_ONCE, last = rest <= 2 ? tokens - rest : tokens;
    for (int64_t half = 0; half < 2; half++) {
        const uint16_t *rows = w + half * 2 * SIDE, *next = w + (CHUNK + half * SIDE) * k;
        for (int64_t t = 0; t < last; t += AT_ONCE)
            (last - t <= 4 ? lanes_of_four : lanes_of_six)(rows, x + t * k, k, last - t, next, sums + (half * MOST + t) * SIDE);
    }
    if (last < tokens) (rest == 1 ? lanes_of_one : lanes_of_two)(w, x + last * k, k, rest, NULL, sums + last * SIDE);
}

static inline vf rounded(vf x) {
    uint16_t h[LANES];
    store_bf16(h, x);
    return load_bf16(h);
}

static void write_lanes(const struct linear *a, const float *sums, int64_t token, int64_t tokens, int64_t row) {
    int64_t rows = min64(CHUNK, a->n - row);
    for (int64_t t = token; t < token + tokens; t++, sums += SIDE) {
        if (a->gated) {
            for (int i = 0; i < SIDE; i += LANES) {
                vf gate = rounded(load(sums + i)), up = rounded(load(sums + SIDE * MOST + i));
                store_bf16((uint16_t *)a->out + (t * a->n + row) / 2 + i, gated_of(gate, up, (int)a->gelu));
            }
            continue;
        }
        for (int64_t i = 0; i < rows; i += LANES) {
            const float *at = sums + i / SIDE * SIDE * MOST + i % SIDE;
            int64_t place = t * a->n + row + i;
            if (i + LANES > rows) {
                for (int64_t j = i; j < rows; j++) write_dot(a, t, row + j, at[j - i]);
                continue;
            }
            vf sum = load(at);
            if (a->bias) sum += load_bf16((const uint16_t *)a->bias + row + i);
            if (a->to_float32) store((float *)a->out + place, sum);
            else store_bf16((uint16_t *)a->out + place, sum);
        }
    }
}

// Chunks of W that all tokens meet before the next.
static int64_t kept_chunks(const struct linear *a) { return KEPT_ROWS / (CHUNK * 2 * a->k) + 1; }

static int64_t block_tokens(const struct linear *a) {
    return min64(MOST / AT_ONCE, max64(1, BLOCK_BYTES / (a->k * 4) / AT_ONCE)) * AT_ONCE;
}

// Of a thread: for a block of tokens in float32, and of codes kept chunks of numbers and one more.
static int64_t room_of(const struct linear *a) {
    return (2 * block_tokens(a) + (a->codes.bits ? (kept_chunks(a) + 1) * CHUNK : 0)) * a->k;
}

// A chunk of codes as pairs; `rows` has room for it.
static void widen_lanes(const struct linear *a, int64_t chunk, uint16_t *rows, uint16_t *out) {
    for (int64_t i = 0; i < CHUNK; i++) widen_row_of(&a->codes, chunk * CHUNK + i, 0, BFLOAT16, rows + i * a->k);
    pack_chunk(rows, CHUNK, a->k, out);
}

// Chunks first .. end - 1 of W with all tokens.
static void multiply_chunks(const struct linear *a, const uint16_t *rest, uint16_t *room, int64_t first, int64_t end) {
    int64_t kept = kept_chunks(a), whole = a->n / CHUNK, size = CHUNK * a->k, block = block_tokens(a);
    float *x = (float *)room;
    uint16_t *rows = room + 2 * block * a->k, *numbers = rows + size;
    float sums[2 * SIDE * MOST];
    for (int64_t begin = first; begin < end; begin += kept) {
        int64_t behind = min64(begin + kept, end);
        for (int64_t chunk = begin; a->codes.bits && chunk < min64(behind, whole); chunk++)
            widen_lanes(a, chunk, rows, numbers + (chunk - begin) * size);
        for (int64_t token = 0; token < a->num_tokens; token += block) {
            int64_t tokens = min64(block, a->num_tokens - token);
            for (int64_t t = 0; t < tokens; t++) widen_token(a, token + t, a->k, x + t * a->k);
            for (int64_t chunk = begin; chunk < behind; chunk++) {
                const uint16_t *w = (const uint16_t *)a->w + chunk * size;
                if (chunk == whole) w = rest;
                else if (a->codes.bits) w = numbers + (chunk - begin) * size;
                multiply_lanes(w, x, a->k, tokens, sums);
                write_lanes(a, sums, token, tokens, chunk * CHUNK);
            }
        }
    }
}
#endif

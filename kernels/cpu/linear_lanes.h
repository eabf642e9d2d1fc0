// Products with a packed W in vectors of rows, for processors with AVX2 or AVX-512 and no instructions for bfloat16, which
// torch's products in bfloat16 need to be fast.
//
// The lanes of a sum are rows, so nothing is left to add up at the end, and AT_ONCE tokens share what is read of W. A word of W
// holds a channel of a row in float32, or two in bfloat16: shifted it is the even one in float32, masked the odd one. Tokens
// are turned before, so that the numbers that meet a channel of W lie side by side. Codes become float32, whatever the format.

#pragma once
#include "activation.h"
#include "linear_dots.h"

#ifdef HAVE_LANES
enum {
    AT_ONCE = LANES == 16 ? 12 : 6,  // tokens; with two vectors of rows 24 sums of 32 registers, or 12 of 16
    SPAN = 2 * LANES,                // rows of these
    PASSES = CHUNK / SPAN,
    MOST = 48,                       // tokens of a block
    TURNED = 10 * MOST,              // tokens that lie turned at a time
    PANEL = 576,                     // channels that a block meets before the next: the second cache keeps their numbers of all tokens
    FEW_CHANNELS = 128               // of codes that are widened for one block of more than FEW tokens: the first cache keeps them
};

static inline vu words_of(const uint16_t *w) {
    vu words;
    memcpy(&words, w, sizeof words);
    return words;
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

// Tokens of a block in float32, AT_ONCE by AT_ONCE [k][tokens], and the channels of a panel.
struct tokens {
    const float *numbers;
    int64_t k, count, from, end;
};

// Where a packed chunk has a word of a row.
static inline int64_t place_in_chunk(int64_t row, int64_t word) { return (word * CHUNK + row) * 2; }

// `rows` rows of W, up to 32, word by word: out[halves / 2][32 rows][2], which is read from its beginning to its end.
// Rows that are missing are zeros.
static void pack_chunk(const uint16_t *w, int64_t rows, int64_t halves, uint16_t *out) {
    for (int64_t c = 0; c < halves; c += 2 * LANES, out += LANES * 2 * CHUNK)
        for (int64_t row = 0; row < CHUNK; row += LANES) {
            vu x[LANES] = {};
            for (int64_t i = 0; i < min64(LANES, rows - row); i++) x[i] = words_of(w + (row + i) * halves + c);
            turn_words(x);
            for (int64_t i = 0; i < LANES; i++) memcpy(out + place_in_chunk(row, i), &x[i], sizeof x[i]);
        }
}

// A channel of the vector of rows at w, where a word has one (WORD 1) or two.
#define WEIGHTS(WORD, w, channel) \
    ((vf)(WORD == 1 ? words_of(w) : channel ? words_of(w) & 0xffff0000 : words_of(w) << 16))

// Where sums[2][MOST][16 rows] has a token's sums of the i-th vector of rows.
static inline int64_t place_of_sums(int64_t i, int64_t token) { return (i * LANES / SIDE * MOST + token) * SIDE + i * LANES % SIDE; }

// What a word of SPAN rows brings near: so many bytes in lines of 64, or fewer.
static inline void fetch_word(const char *next, int64_t bytes) {
    for (int64_t i = 0; i < 2 / PASSES; i++) __builtin_prefetch(next + i * bytes * PASSES / 2, 0, 2);
}

// Sums of `T` tokens, or as many as there are, and the rows of V vectors, to their places from `out` on, where panels but the
// first find what came before. Channels are taken one by one, so a sum is the same in any of these. If the
// loop over them were unrolled, or words of W kept for both of their channels, GCC would run out of registers. next: what is
// brought to the second cache meanwhile, so many bytes for each word; one and two tokens ask for what they read soon instead.
#define DEFINE_LANES(NAME, T, V, WORD)                                                                                            \
    static void NAME(const uint16_t *w, const struct tokens *x, int64_t first, const char *next, int64_t bytes, float *out) {     \
        const float *in = x->numbers + first * x->k + x->from * T;                                                                \
        vf sums[T][V] = {};                                                                                                       \
        if (x->from) _Pragma("GCC unroll 12") for (int64_t t = 0; t < T; t++)                                                     \
            _Pragma("GCC unroll 4") for (int64_t i = 0; i < V; i++)                                                               \
                sums[t][i] = load(out + place_of_sums(i, min64(t, x->count - first - 1)));                                        \
        _Pragma("GCC unroll 1") for (int64_t c = x->from; c < x->end; c += WORD, in += T * WORD, w += 2 * CHUNK, next += bytes) { \
            if (T > FEW) fetch_word(next, bytes);                                                                                 \
            else if (AHEAD) fetch_word((const char *)w + AHEAD, 4 * CHUNK);                                                       \
            _Pragma("GCC unroll 2") for (int j = 0; j < WORD; j++) {                                                              \
                vf weights[V];                                                                                                    \
                _Pragma("GCC unroll 4") for (int i = 0; i < V; i++) weights[i] = WEIGHTS(WORD, w + i * 2 * LANES, j);             \
                _Pragma("GCC unroll 12") for (int t = 0; t < T; t++) {                                                            \
                    vf number = splat(in[j * T + t]);                                                                             \
                    _Pragma("GCC unroll 4") for (int i = 0; i < V; i++) sums[t][i] += weights[i] * number;                        \
                }                                                                                                                 \
            }                                                                                                                     \
        }                                                                                                                         \
        for (int64_t t = 0; t < min64(T, x->count - first); t++)                                                                  \
            for (int64_t i = 0; i < V; i++) store(out + place_of_sums(i, t), sums[t][i]);                                         \
    }
#if LANES == 16
#define DEFINE_ALL(FORMAT, WORD)            \
    DEFINE_LANES(FORMAT##_1, 1, ALL, WORD)  \
    DEFINE_LANES(FORMAT##_2, 2, ALL, WORD)  \
    DEFINE_LANES(FORMAT##_4, 4, 2, WORD)    \
    DEFINE_LANES(FORMAT##_8, 8, 2, WORD)    \
    DEFINE_LANES(FORMAT##_12, 12, 2, WORD)
#define KERNELS(FORMAT) {{1, FORMAT##_1}, {2, FORMAT##_2}, {4, FORMAT##_4}, {8, FORMAT##_8}, {12, FORMAT##_12}}
#else
#define DEFINE_ALL(FORMAT, WORD)            \
    DEFINE_LANES(FORMAT##_1, 1, ALL, WORD)  \
    DEFINE_LANES(FORMAT##_2, 2, ALL, WORD)  \
    DEFINE_LANES(FORMAT##_4, 4, 2, WORD)    \
    DEFINE_LANES(FORMAT##_6, 6, 2, WORD)
#define KERNELS(FORMAT) {{1, FORMAT##_1}, {2, FORMAT##_2}, {4, FORMAT##_4}, {6, FORMAT##_6}}
#endif
DEFINE_ALL(float32, 1)
DEFINE_ALL(bfloat16, 2)

// Kernels of ever more tokens. The first two have all rows of a chunk, the others SPAN of them.
struct lanes_kernel {
    int64_t tokens;
    void (*run)(const uint16_t *, const struct tokens *, int64_t, const char *, int64_t, float *);
};
static const struct lanes_kernel kernels[][5] = {[FLOAT32] = KERNELS(float32), [BFLOAT16] = KERNELS(bfloat16)};

// The kernel that takes so many tokens, or, of more than AT_ONCE, the first of them.
static inline const struct lanes_kernel *kernel_for(const struct lanes_kernel *kernel, int64_t tokens) {
    while (kernel->tokens < min64(tokens, AT_ONCE)) kernel++;
    return kernel;
}

// Where numbers of a block's tokens end, if there are so many.
static inline int64_t numbers_of(int64_t tokens, int64_t k) {
    int64_t rest = tokens % AT_ONCE;
    return (tokens - rest + (rest ? kernel_for(kernels[FLOAT32], rest)->tokens : 0)) * k;
}

// Numbers of a full block and what the last vector of a block writes past them.
static inline int64_t block_room(int64_t k) { return MOST * k + LANES; }

// A panel of a chunk and a block of tokens. As much of the panel behind it is brought near by the tokens that meet a pass of
// rows, each AT_ONCE their share: by the first of them alone it would be more at a time than the memory gives. One and two
// tokens are done sooner than it comes, and the processor itself reads ahead.
static void multiply_panel(const struct lanes_kernel *kernel, const uint16_t *w, int64_t halves, const struct tokens *x, float *sums) {
    int64_t rest = x->count % AT_ONCE, last = rest <= FEW ? x->count - rest : x->count;
    int64_t shares = (last + AT_ONCE - 1) / AT_ONCE, pass_bytes = SPAN * 2 * halves;
    for (int64_t pass = 0; pass < PASSES; pass++) {
        const char *next = (const char *)(w + CHUNK * halves) + pass * pass_bytes;
        for (int64_t i = 0; i < shares; i++) {
            int64_t t = i * AT_ONCE;
            const char *share = next + i * pass_bytes / shares;
            kernel_for(kernel, last - t)->run(w + pass * 2 * SPAN, x, t, share, 4 * SPAN / shares, sums + place_of_sums(2 * pass, t));
        }
    }
    if (last < x->count) kernel_for(kernel, rest)->run(w, x, last, NULL, 0, sums + place_of_sums(0, last));
}

// A chunk and a block of tokens: sums[2][MOST][16 rows].
static void multiply_lanes(const struct linear *a, const uint16_t *w, struct tokens x, float *sums) {
    int64_t halves_each = row_halves(a) / a->k, panel = x.count <= FEW ? a->k : PANEL;  // so few stay near anyway
    for (x.from = 0; x.from < a->k; x.from = x.end) {
        x.end = min64(x.from + panel, a->k);
        multiply_panel(kernels[format_of_weights(a)], w + x.from * halves_each * CHUNK, (x.end - x.from) * halves_each, &x, sums);
    }
}

// A chunk of codes and a block that is all tokens.
static void multiply_codes(const struct linear *a, int64_t chunk, struct tokens x, uint16_t *numbers, float *sums) {
    if (x.count <= FEW) {
        vf few[FEW][ALL];
        meet_codes(&a->codes, chunk, x.count, x.numbers, few);
        for (int64_t t = 0; t < x.count; t++)
            for (int64_t i = 0; i < ALL; i++) store(sums + place_of_sums(i, t), few[t][i]);
        return;
    }
    for (x.from = 0; x.from < a->k; x.from = x.end) {
        x.end = min64(x.from + FEW_CHANNELS, a->k);
        widen_lanes(&a->codes, chunk, x.from, x.end, (float *)numbers);
        multiply_panel(kernels[FLOAT32], numbers, (x.end - x.from) * 2, &x, sums);
    }
}

static inline vf load_numbers(int64_t format, const void *p, int64_t i) {
    return format == FLOAT32 ? load((const float *)p + i) : load_bf16((const uint16_t *)p + i);
}
static inline void store_numbers(int64_t format, void *p, int64_t i, vf x) {
    if (format == FLOAT32) store((float *)p + i, x);
    else store_bf16((uint16_t *)p + i, x);
}

static inline vf rounded(int64_t format, vf x) {
    uint16_t h[LANES];
    if (format == FLOAT32) return x;
    store_bf16(h, x);
    return load_bf16(h);
}

static void write_lanes(const struct linear *a, const float *sums, int64_t token, int64_t tokens, int64_t row) {
    int64_t rows = min64(CHUNK, a->n - row), format = a->to_float32 ? FLOAT32 : a->format;
    for (int64_t t = token; t < token + tokens; t++, sums += SIDE) {
        if (a->gated) {
            for (int i = 0; i < SIDE; i += LANES) {
                vf gate = rounded(format, load(sums + i)), up = rounded(format, load(sums + SIDE * MOST + i));
                store_numbers(format, a->out, (t * a->n + row) / 2 + i, gated_of(gate, up, (int)a->gelu));
            }
            continue;
        }
        for (int64_t i = 0; i < rows; i += LANES) {
            const float *at = sums + i / SIDE * SIDE * MOST + i % SIDE;
            if (i + LANES > rows) {
                for (int64_t j = i; j < rows; j++) write_dot(a, t, row + j, at[j - i]);
                continue;
            }
            vf sum = load(at);
            if (a->bias) sum += load_numbers(a->format, a->bias, row + i);
            store_numbers(format, a->out, t * a->n + row + i, sum);
        }
    }
}

// Chunks of W that all tokens meet before the next.
static int64_t kept_chunks(const struct linear *a) { return KEPT_ROWS / (CHUNK * 2 * row_halves(a)) + 1; }
static int64_t chunks_of_part(const struct linear *a) { return kept_chunks(a); }

// Of a thread, for numbers that were codes: kept chunks, or what one block of tokens wants at a time.
static int64_t room_of(const struct linear *a) {
    if (!a->codes.bits || a->num_tokens <= FEW) return 0;
    if (a->num_tokens <= MOST) return CHUNK * 2 * min64(a->k, FEW_CHANNELS);
    return kept_chunks(a) * CHUNK * row_halves(a);
}

// Floats for as many tokens as lie turned at a time.
static int64_t turned_room(const struct linear *a) {
    int64_t count = min64(a->num_tokens, TURNED);
    return count / MOST * block_room(a->k) + numbers_of(count % MOST, a->k) + LANES;
}

struct turning {
    const struct linear *a;
    int64_t first, count;
    float *out;  // a block has its room
};

// A task: a block of MOST tokens. A vector of tokens is stored for each channel, and what it has past the last of them is
// overwritten by the next.
static void turn_block(const void *context, int64_t block, int64_t thread) {
    const struct turning *t = context;
    const struct linear *a = t->a;
    int64_t behind = min64((block + 1) * MOST, t->count);
    float *out = t->out + block * block_room(a->k);
    for (int64_t token = block * MOST, count; token < behind; token += count, out += numbers_of(count, a->k)) {
        count = min64(AT_ONCE, behind - token);
        int64_t width = kernel_for(kernels[FLOAT32], count)->tokens;
        for (int64_t c = 0; c < a->k; c += LANES) {
            vu x[LANES] = {};
            for (int64_t i = 0; i < count; i++) x[i] = (vu)load_numbers(a->format, a->x, (t->first + token + i) * a->x_stride + c);
            turn_words(x);
            for (int64_t i = 0; i < LANES; i++) store(out + (c + i) * width, (vf)x[i]);
        }
    }
}

// The product of the tokens that were turned.
static struct linear product_of(const struct turning *t) {
    struct linear some = *t->a;
    int64_t outputs = some.gated ? some.n / 2 : some.n, bytes = some.format == FLOAT32 || some.to_float32 ? 4 : 2;
    some.x = t->out;
    some.num_tokens = t->count;
    some.out = (uint8_t *)some.out + t->first * outputs * bytes;
    return some;
}

// Chunks first .. end - 1 of W with all tokens, which are turned.
static void multiply_chunks(const struct linear *a, const uint16_t *rest, uint16_t *numbers, int64_t first, int64_t end) {
    int64_t kept = kept_chunks(a), whole = a->n / CHUNK, size = CHUNK * row_halves(a), one_block = a->num_tokens <= MOST;
    float sums[2 * SIDE * MOST];
    for (int64_t begin = first; begin < end; begin += kept) {
        int64_t behind = min64(begin + kept, end);
        for (int64_t chunk = begin; a->codes.bits && !one_block && chunk < min64(behind, whole); chunk++)
            widen_lanes(&a->codes, chunk, 0, a->k, (float *)(numbers + (chunk - begin) * size));
        for (int64_t token = 0; token < a->num_tokens; token += MOST) {
            struct tokens x = {(const float *)a->x + token / MOST * block_room(a->k), a->k, min64(MOST, a->num_tokens - token), 0, 0};
            for (int64_t chunk = begin; chunk < behind; chunk++) {
                if (chunk == whole) multiply_lanes(a, rest, x, sums);
                else if (!a->codes.bits) multiply_lanes(a, (const uint16_t *)a->w + chunk * size, x, sums);
                else if (one_block) multiply_codes(a, chunk, x, numbers, sums);
                else multiply_lanes(a, numbers + (chunk - begin) * size, x, sums);
                write_lanes(a, sums, token, x.count, chunk * CHUNK);
            }
        }
    }
}
#endif

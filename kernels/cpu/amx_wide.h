// Attention over one block on the matrix unit (amx.h) for more than 16 queries, 16 at a time.
//
// Here queries are A and keys, turned once for all of them, are B: logits come out as [query][key], and weights are A of the
// second product as they are. Every number is the same as in amx.h: products have the same terms in the same order, and so
// have sums of weights.

#pragma once
#include "amx.h"

#ifdef HAVE_AMX
enum { GROUP = 16, TILE = 16 * 32 };  // queries at a time; numbers of a tile of bfloat16

// Tiles 0 to 3: sums; 4: queries or weights; 5 and 6: keys or values.
static void shape_wide_tiles(void) {
    struct tile_shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = 64;
        shapes.rows[i] = 16;
    }
    load_shapes(&shapes);
}

// A block's keys as tiles of pairs of channels: out[padded / 32][BLOCK / 16][16 pairs][16 keys][2].
static void turn_keys(const uint16_t *const *keys, int64_t padded, uint16_t *out) {
    for (int64_t c = 0; c < padded; c += 32)
        for (int i = 0; i < BLOCK / 16; i++, out += TILE) {
            __m512i x[16];
            for (int j = 0; j < 16; j++) x[j] = _mm512_loadu_si512(keys[i] + j * padded + c);
            turn_pairs(x);
            for (int j = 0; j < 16; j++) _mm512_storeu_si512(out + j * 32, x[j]);
        }
}

// x[m][j] = q[m] . k[j] for one group of queries.
static void wide_products(const uint16_t *q, const uint16_t *keys, int64_t padded, float *x) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < padded; c += 32, keys += 4 * TILE) {
        _tile_loadd(4, q + c, (size_t)padded * 2);
        _tile_loadd(5, keys, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, keys + TILE, 64);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(5, keys + 2 * TILE, 64);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, keys + 3 * TILE, 64);
        _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(0, x, BLOCK * 4);
    _tile_stored(1, x + 16, BLOCK * 4);
    _tile_stored(2, x + 32, BLOCK * 4);
    _tile_stored(3, x + 48, BLOCK * 4);
}

// Turns the products of one group, [GROUP][BLOCK], into weights in bfloat16, [GROUP][BLOCK], and fades older outputs.
// changes: logits are more than products times a factor. See weigh_columns.
static inline __attribute__((always_inline)) void weigh_wide(
    const struct attention *a, const struct queries *q, const struct scales *scales, int64_t start, int64_t m, int changes, int hides,
    float *x, struct state *s, uint16_t *weights
) {
    enum { PARTS = BLOCK / LANES };
    vf gain = splat(a->soft_cap > 0 ? 1 : q->factor), rows[GROUP];
    for (int i = 0; i < GROUP; i++) {
        vf logits[PARTS];
        for (int j = 0; j < PARTS; j++) {
            logits[j] = load(x + i * BLOCK + j * LANES);
            if (!changes) continue;
            vi place = lanes() + (int32_t)(start + j * LANES), position = (vi){} + q->position[m + i];
            vi oldest = a->window ? position + 1 - (int32_t)a->window : (vi){};
            vf k_scale = a->k_scale ? load(scales->k + j * LANES) : (vf){};
            logits[j] = logits_over(a, logits[j], k_scale, q->factor, hides, place, position, oldest);
            store(x + i * BLOCK + j * LANES, logits[j]);
        }
        rows[i] = larger(larger(logits[0], logits[1]), larger(logits[2], logits[3]));
    }
    vf before = load(s->top + m), top = larger(fold_larger(rows) * gain, before);
    vf origin = choose(top == -INFINITY, (vf){}, top), fades = weight_of(before - origin);
    float origins[GROUP], fade[GROUP];
    store(origins, origin);
    store(fade, fades);
    for (__mmask16 left = _mm512_cmp_ps_mask((__m512)fades, _mm512_set1_ps(1), _CMP_NEQ_UQ); left; left &= left - 1) {
        int i = __builtin_ctz(left);
        scale_row(s->out + (m + i) * a->vectors * LANES, fade[i], a->vectors);
    }
    for (int i = 0; i < GROUP; i++) {
        vf w[PARTS];
        for (int j = 0; j < PARTS; j++) w[j] = weight_of(above(load(x + i * BLOCK + j * LANES), gain, splat(origins[i])));
        rows[i] = ((w[0] + w[1]) + w[2]) + w[3];
        for (int j = 0; j < PARTS && a->k_scale; j++) w[j] *= load(scales->v + j * LANES);
        for (int j = 0; j < PARTS; j += 2)
            _mm512_storeu_si512(weights + i * BLOCK + j * LANES, (__m512i)_mm512_cvtne2ps_pbh((__m512)w[j + 1], (__m512)w[j]));
    }
    store(s->total + m, load(s->total + m) * fades + fold(rows));
    store(s->top + m, top);
}

// out[m] += sum over the block's positions of weights[m][j] * v[j], for one group of queries and 64 channels, or 32.
static inline __attribute__((always_inline)) void add_channels(float *out, const uint16_t *weights, const uint16_t *v, int64_t padded, int all) {
    size_t stride = (size_t)padded * 4;
    _tile_loadd(0, out, stride);
    _tile_loadd(1, out + 16, stride);
    if (all) _tile_loadd(2, out + 32, stride);
    if (all) _tile_loadd(3, out + 48, stride);
    for (int64_t j = 0; j < BLOCK; j += 32, v += 32 * padded) {
        _tile_loadd(4, weights + j, BLOCK * 2);
        _tile_loadd(5, v, stride);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, v + 32, stride);
        _tile_dpbf16ps(1, 4, 6);
        if (!all) continue;
        _tile_loadd(5, v + 64, stride);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, v + 96, stride);
        _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(0, out, stride);
    _tile_stored(1, out + 16, stride);
    if (all) _tile_stored(2, out + 32, stride);
    if (all) _tile_stored(3, out + 48, stride);
}

static void add_values_wide(float *out, const uint16_t *weights, const uint16_t *v, int64_t padded) {
    int64_t c = 0;
    for (; c + 64 <= padded; c += 64) add_channels(out + c, weights, v + 2 * c, padded, 1);
    if (c < padded) add_channels(out + c, weights, v + 2 * c, padded, 0);
}

// Queries meet the keys and values of positions begin .. end - 1, all in one block.
static void meet_wide(const struct attention *a, int64_t row, int64_t kv_head, int64_t begin, int64_t end, const struct queries *q, struct ahead *ahead, struct state *s) {
    struct halves b;
    struct scales scales;
    _Alignas(64) uint16_t keys[BLOCK * MAX_DIM], weights[GROUP * BLOCK];
    _Alignas(64) float x[2][GROUP * BLOCK];
    int64_t padded = a->vectors * LANES, start = begin / BLOCK * BLOCK, m = 0, end_row = (q->rows + GROUP - 1) / GROUP * GROUP;
    read_block(a, row, kv_head, begin, end, ahead, &b, &scales);
    turn_keys(b.keys, padded, keys);
    while (start > q->position[m + GROUP - 1]) m += GROUP;  // queries that come before the block, and that are long past it
    while (a->window && start + BLOCK <= q->position[end_row - GROUP] + 1 - a->window) end_row -= GROUP;
    settle(keys);
    wide_products(q->halves + m * padded, keys, padded, x[0]);
    for (int turn = 0; m < end_row; m += GROUP, turn ^= 1) {
        fetch_some(a, ahead);
        // Products of the next group first, so that weights do not wait for theirs.
        if (m + GROUP < end_row) wide_products(q->halves + (m + GROUP) * padded, keys, padded, x[turn ^ 1]);
        int hides = some_hidden(a, start, q->position[m], q->position[m + GROUP - 1]);
        if (hides || a->k_scale || a->soft_cap > 0) weigh_wide(a, q, &scales, start, m, 1, hides, x[turn], s, weights);
        else weigh_wide(a, q, &scales, start, m, 0, 0, x[turn], s, weights);
        settle(weights);
        add_values_wide(s->out + m * padded, weights, b.v, padded);
    }
}
#endif

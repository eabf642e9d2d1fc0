/* The sampler's operations on CPU; formulas, shapes and dtypes are in sampling_ops.py.

   A row is cut into ranges of columns and threads take (row, range) pairs. What ranges find is put together as
   integers, by sums or by the largest one, so neither the threads nor the ranges change a result. Inner loops go over
   blocks of fixed length and are written so that compilers vectorise them without -ffast-math: no branches, no
   floating-point sums, comparisons in integers where NaN must have its place. */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "noise.h"
#include "pool.h"

enum { LONG_BLOCK = 2048, RANGE = 16384 };

#define NO_KEY INT32_MIN
#define NAN_KEY INT32_MAX

/* Signed keys in the order of the values. */
static inline int32_t signed_key(float x) {
    int32_t i = bits_of(x);
    return i ^ ((i >> 31) & INT32_MAX);
}

/* The same, with one key for both zeros and the largest one for every NaN. */
static inline int32_t rank_of(float x) {
    int32_t is_nan = -(x != x);
    return (signed_key(x + 0.0f) & ~is_nan) | (NAN_KEY & is_nan);
}

/* A (row, range) pair. */
typedef struct {
    int64_t row, begin, end;
} Place;

static inline int64_t ranges_of(int64_t columns) { return (columns + RANGE - 1) / RANGE; }

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline Place place_of(int64_t task, int64_t columns) {
    int64_t ranges = ranges_of(columns), begin = task % ranges * RANGE;
    return (Place){task / ranges, begin, smaller(begin + RANGE, columns)};
}

/* ---------------------------------------------------------------------------------------------- largest score */

typedef struct {
    float best; /* -inf, or NaN: the search is over */
    int64_t column;
} Best;

static void plain_block(const float *x, int n, int64_t column, Best *found) {
    int32_t largest = NO_KEY;
    for (int i = 0; i < n; i++) {
        int32_t rank = rank_of(x[i]);
        largest = rank > largest ? rank : largest;
    }
    if (largest <= rank_of(found->best)) return;
    int i = 0;
    while (rank_of(x[i]) != largest) i++;
    *found = (Best){x[i], column + i};
}

/* Most scores cannot win, which a bound tells for much less than the noise costs: first of x alone, then of x and
   the random bits. What is left is worked out in order, so the outcome is that of working out all. */
static void noisy_block(const float *x, int n, int64_t column, uint64_t seed, int64_t token, uint64_t place,
                        Best *found) {
    uint32_t words[BLOCK];
    float bound[BLOCK];
    int promising = 0;
    for (int i = 0; i < n; i++) promising |= !(x[i] + LARGEST_NOISE <= found->best);
    if (!promising) return;
    philox_block(seed, (uint32_t)(token / LANES), place, words);
    const uint32_t *word = words + token % LANES;
    promising = 0;
    for (int i = 0; i < n; i++) {
        bound[i] = x[i] + gumbel_bound(word[i] >> 9);
        promising |= !(bound[i] <= found->best);
    }
    if (!promising) return;
    for (int i = 0; i < n; i++) {
        if (bound[i] <= found->best) continue;
        float score = x[i] + gumbel(word[i] >> 9);
        if (!(score <= found->best)) *found = (Best){score, column + i};
        if (score != score) return;
    }
}

static Best best_of_scores(const float *scores, int64_t begin, int64_t end) {
    Best found = {-INFINITY, begin};
    for (int64_t column = begin; column < end && found.best == found.best; column += LONG_BLOCK)
        plain_block(scores + column, (int)smaller(LONG_BLOCK, end - column), column, &found);
    return found;
}

static Best best_of_logits(const float *logits, int64_t begin, int64_t end, float temperature, float cut, int sampled,
                           uint64_t seed, uint64_t place, int64_t first_token) {
    float x[BLOCK];
    Best found = {-INFINITY, begin};
    int n;
    for (int64_t column = begin; column < end && found.best == found.best; column += n) {
        int64_t token = first_token + column;
        /* Blocks begin at whole counters, but for the first one of a rank whose tokens do not. */
        n = (int)smaller(BLOCK - token % LANES, end - column);
        for (int i = 0; i < n; i++) {
            float scaled = logits[column + i] / temperature;
            x[i] = scaled < cut ? -INFINITY : scaled;
        }
        if (sampled)
            noisy_block(x, n, column, seed, token, place, &found);
        else
            plain_block(x, n, column, &found);
    }
    return found;
}

typedef struct {
    const float *logits, *temperature, *cut;
    const int64_t *seeds, *places;
    const uint8_t *sampled;
    int64_t stride, columns, first_token;
    _Atomic int64_t *packed; /* see sampling_ops.row_argmax */
} Argmax;

static void argmax_of_range(const void *context, int64_t task, int64_t thread) {
    const Argmax *a = context;
    Place at = place_of(task, a->columns);
    int64_t row = at.row;
    const float *x = a->logits + row * a->stride;
    Best found = a->sampled ? best_of_logits(x, at.begin, at.end, a->temperature[row], a->cut[row], a->sampled[row],
                                             (uint64_t)a->seeds[row], (uint64_t)a->places[row], a->first_token)
                            : best_of_scores(x, at.begin, at.end);
    int64_t packed = (int64_t)rank_of(found.best) * (1LL << 32) + (UINT32_MAX - (a->first_token + found.column));
    for (int64_t so_far = a->packed[row]; packed > so_far;)
        if (atomic_compare_exchange_weak(&a->packed[row], &so_far, packed)) break;
}

/* sampled == NULL: row_argmax; the other vectors are not read then. */
void sampling_argmax(const float *logits, int64_t stride, int64_t rows, int64_t columns, const float *temperature,
                     const float *cut, const int64_t *seeds, const int64_t *places, const uint8_t *sampled,
                     int64_t first_token, int64_t *packed, int threads) {
    Argmax argmax = {logits, temperature, cut, seeds, places, sampled, stride, columns, first_token,
                     (_Atomic int64_t *)packed};
    for (int64_t row = 0; row < rows; row++) packed[row] = INT64_MIN;
    kvshard_share_out(argmax_of_range, &argmax, rows * ranges_of(columns), threads);
}

void sampling_best(const int64_t *packed, int64_t ranks, int64_t rows, float *best, int64_t *token) {
    for (int64_t row = 0; row < rows; row++) {
        int64_t largest = packed[row];
        for (int64_t rank = 1; rank < ranks; rank++) {
            int64_t other = packed[rank * rows + row];
            largest = other > largest ? other : largest;
        }
        int32_t key = (int32_t)(largest >> 32);
        best[row] = float_of(key ^ ((key >> 31) & INT32_MAX));
        token[row] = isfinite(best[row]) ? UINT32_MAX - (largest & UINT32_MAX) : -1;
    }
}

/* ---------------------------------------------------------------------------------------------- mass */

/* exp(difference) * 2^40, rounded to an integer: exp(d) = 2^n exp(r) with |r| <= log(2) / 2 and Taylor's series, whose
   next term is below 2^-27. Nothing but sums and products, so that each processor and each vector length give the same
   bits. Differences are clamped to where the result is 0 and to 0; NaN becomes 0 mass. */
static inline float fixed_point_mass(float difference) {
    float d = difference > -60.0f ? difference : -60.0f;
    d = d < 0.0f ? d : 0.0f;
    float n = (d * 1.44269504f + 0x1.8p23f) - 0x1.8p23f; /* to the nearest integer */
    float r = (d - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f; /* log(2) in two parts, the first times n is exact */
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    float mass = p * float_of(((int32_t)n + 40 + 127) * (1 << 23));
    /* From 2^23 on a float is an integer. */
    return mass < 0x1p23f ? (mass + 0x1p23f) - 0x1p23f : mass;
}

typedef struct {
    const float *logits, *max_logits;
    int64_t stride, columns;
    _Atomic int64_t *mass;
} Mass;

static void mass_of_range(const void *context, int64_t task, int64_t thread) {
    const Mass *a = context;
    Place at = place_of(task, a->columns);
    float max_logit = a->max_logits[at.row], masses[BLOCK];
    int64_t total = 0;
    for (int64_t column = at.begin; column < at.end; column += BLOCK) {
        const float *x = a->logits + at.row * a->stride + column;
        int n = (int)smaller(BLOCK, at.end - column);
        for (int i = 0; i < n; i++) masses[i] = fixed_point_mass(x[i] - max_logit);
        for (int i = 0; i < n; i++) total += (int64_t)masses[i];
    }
    a->mass[at.row] += total;
}

void sampling_mass(const float *logits, int64_t stride, int64_t rows, int64_t columns, const float *max_logits,
                   int64_t *mass, int threads) {
    Mass sums = {logits, max_logits, stride, columns, (_Atomic int64_t *)mass};
    memset(mass, 0, sizeof *mass * (size_t)rows);
    kvshard_share_out(mass_of_range, &sums, rows * ranges_of(columns), threads);
}

#include "radix_select.h"

/* ---------------------------------------------------------------------------------------------- for tests */

void sampling_philox(const int64_t *seeds, const int64_t *places, int64_t rows, int64_t first_token, int64_t count,
                     int64_t *out) {
    uint32_t words[BLOCK];
    for (int64_t row = 0; row < rows; row++) {
        int n;
        for (int64_t i = 0; i < count; i += n) {
            int64_t token = first_token + i;
            n = (int)smaller(BLOCK - token % LANES, count - i);
            philox_block((uint64_t)seeds[row], (uint32_t)(token / LANES), (uint64_t)places[row], words);
            for (int j = 0; j < n; j++) out[row * count + i + j] = words[token % LANES + j];
        }
    }
}

void sampling_gumbel(const int64_t *bits, int64_t count, float *noise, float *bound) {
    for (int64_t i = 0; i < count; i++) {
        noise[i] = gumbel((uint32_t)bits[i]);
        bound[i] = gumbel_bound((uint32_t)bits[i]);
    }
}

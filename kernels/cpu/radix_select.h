/* Histograms of bytes of sort keys (runtime/shard/radix_select.py), counted or weighed by mass. A part of sampling.c, which
   includes it behind what it is made of: places, blocks, keys and masses. */

#pragma once

enum { BINS = 256, TABLES = 4 };

typedef struct {
    float temperature, cut, max_logit;
    int counts; /* every entry weighs 1 and the others are not read */
    int64_t prefix;
    int shift;
} Round;

/* A byte and a weight for each entry that takes part; returns how many do. */
static int chosen_entries(const float *logits, int n, const Round *r, uint8_t *bytes, float *weights) {
    uint32_t keys[BLOCK];
    float x[BLOCK];
    int32_t taken[BLOCK], first = r->shift == 24, num_taken = 0, m = 0;
    uint32_t prefix = (uint32_t)r->prefix, above = first ? 0 : (uint32_t)r->shift + 8;
    for (int i = 0; i < n; i++) {
        keys[i] = (uint32_t)signed_key(logits[i]) ^ 0x80000000u;
        taken[i] = first | (keys[i] >> above == prefix);
        num_taken += taken[i];
        x[i] = logits[i];
    }
    if (num_taken == 0) return 0;
    if (!r->counts) {
        num_taken = 0;
        for (int i = 0; i < n; i++) {
            x[i] = x[i] / r->temperature;
            taken[i] &= x[i] >= r->cut;
            num_taken += taken[i];
        }
        if (num_taken == 0) return 0;
    }
    for (int i = 0; i < n; i++) bytes[i] = (uint8_t)(keys[i] >> r->shift);
    /* Closed up without branches: which entries take part is not to be guessed. */
    if (num_taken < n)
        for (int i = 0; i < n; i++) {
            bytes[m] = bytes[i];
            x[m] = x[i];
            m += taken[i];
        }
    else
        m = n;
    if (!r->counts)
        for (int i = 0; i < m; i++) weights[i] = fixed_point_mass(x[i] - r->max_logit);
    return m;
}

static void add_to_histogram(const float *logits, int64_t columns, const Round *r, _Atomic int64_t *histogram) {
    /* Several tables, so that entries of one bin need not wait for each other. */
    int64_t tables[TABLES][BINS] = {{0}};
    uint8_t bytes[BLOCK];
    float weights[BLOCK];
    for (int64_t column = 0; column < columns; column += BLOCK) {
        int m = chosen_entries(logits + column, (int)smaller(BLOCK, columns - column), r, bytes, weights);
        if (r->counts)
            for (int i = 0; i < m; i++) tables[i % TABLES][bytes[i]]++;
        else
            for (int i = 0; i < m; i++) tables[i % TABLES][bytes[i]] += (int64_t)weights[i];
    }
    for (int bin = 0; bin < BINS; bin++) {
        int64_t sum = 0;
        for (int table = 0; table < TABLES; table++) sum += tables[table][bin];
        if (sum != 0) histogram[bin] += sum;
    }
}

typedef struct {
    const float *logits, *temperature, *cut, *max_logits;
    const int64_t *prefix;
    int64_t stride, columns;
    int shift;
    _Atomic int64_t *histogram;
} Histogram;

static void histogram_of_range(const void *context, int64_t task, int64_t thread) {
    const Histogram *a = context;
    Place at = place_of(task, a->columns);
    int64_t row = at.row;
    if (a->prefix[row] >> (24 - a->shift)) return; /* negative or too large: no key begins like this */
    Round round = {1.0f, 0.0f, 0.0f, a->temperature == NULL, a->prefix[row], a->shift};
    if (a->temperature != NULL) {
        round.temperature = a->temperature[row];
        round.cut = a->cut[row];
        round.max_logit = a->max_logits[row];
    }
    add_to_histogram(a->logits + row * a->stride + at.begin, at.end - at.begin, &round, a->histogram + row * BINS);
}

/* temperature == NULL: count_histogram; cut and max_logits are not read then. */
void sampling_histogram(const float *logits, int64_t stride, int64_t rows, int64_t columns, const float *temperature,
                        const float *cut, const float *max_logits, const int64_t *prefix, int shift,
                        int64_t *histogram, int threads) {
    Histogram sums = {logits, temperature, cut, max_logits, prefix, stride, columns, shift, (_Atomic int64_t *)histogram};
    memset(histogram, 0, sizeof *histogram * BINS * (size_t)rows);
    kvshard_share_out(histogram_of_range, &sums, rows * ranges_of(columns), threads);
}

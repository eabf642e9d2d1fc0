// Weights that are kept as codes (kernels/weight_codes.py), and their numbers. A number is made in float32, exactly but for
// the last sum, and rounded once to the format of the matrix, or not at all (format_of_weights in linear_dots.h).

#pragma once
#include "matrix_unit.h"
#include "vectors.h"

struct codes {
    const uint8_t *codes;
    const _Float16 *scales, *minima;  // minima may be null
    int64_t bits, groups;             // bits 0: not codes; groups of 32 channels in a row
};

enum { GROUP = 32 };

static inline int64_t group_bytes(const struct codes *w) { return GROUP * w->bits / 8; }

// A group's numbers.
static inline void widen_group(const struct codes *w, int64_t row, int64_t group, float *out) {
    int64_t at = row * w->groups + group;
    const uint8_t *codes = w->codes + at * group_bytes(w);
    float scale = (float)w->scales[at];
    if (w->bits == 8) {
        for (int i = 0; i < GROUP; i += LANES) store(out + i, load_i8((const int8_t *)codes + i) * scale);
        return;
    }
    for (int i = 0; i < GROUP / 2; i += LANES) {
        vu both = wide_u8(codes + i);
        vi lower = (vi)(both & 15), upper = (vi)(both >> 4);
        if (w->minima) {
            float least = (float)w->minima[at];
            store(out + i, to_float(lower) * scale + least);
            store(out + GROUP / 2 + i, to_float(upper) * scale + least);
        } else {
            store(out + i, to_float(lower - 8) * scale);
            store(out + GROUP / 2 + i, to_float(upper - 8) * scale);
        }
    }
}

static inline void round_group(const float *x, int64_t format, void *out) {
    for (int i = 0; i < GROUP; i += LANES) switch (format) {
        case FLOAT32: store((float *)out + i, load(x + i)); break;
        case BFLOAT16: store_bf16((uint16_t *)out + i, load(x + i)); break;
        default: store_f16((_Float16 *)out + i, load(x + i));
        }
}

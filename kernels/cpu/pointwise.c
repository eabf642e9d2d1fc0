// Norms, rotary with the cache write, and gated activations. Formulas and shapes: kernels/ops.py.
//
// Threads share out tokens; each token is worked out by one of them, always in the same order.

#include <math.h>

#include "activation.h"
#include "pool.h"

enum {
    MAX_DIM = 1024,
    SMALL = 32768,  // elements of a call that are not worth a second thread
};

// Parts of a call that threads take in turn, each of at least half as many elements.
static int64_t token_parts(int64_t tokens, int64_t elements) {
    int64_t parts = 2 * elements / SMALL;
    return parts < 2 ? 1 : parts < tokens ? parts : tokens;
}

// e4m3 nearest to x, |x| <= 448, ties to even.
static inline uint8_t to_e4m3(float x) {
    uint32_t bits, sign;
    memcpy(&bits, &x, 4);
    sign = bits >> 24 & 0x80;
    float size = fabsf(x);
    if (size < 0x1p-6f) return (uint8_t)(sign | (uint32_t)rintf(size * 512));  // subnormal: multiples of 2^-9
    bits &= 0x7fffffff;
    return (uint8_t)(sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3)));
}

// One key or value of d channels into row `at` of a cache.
static void quantise(const float *x, int64_t d, int64_t format, void *rows, _Float16 *scales, int64_t at) {
    float low = x[0], high = x[0], broken = 0;
    for (int64_t c = 0; c < d; c++) {
        low = x[c] < low ? x[c] : low;
        high = x[c] > high ? x[c] : high;
    }
    for (int64_t c = 0; c < d; c++) broken += x[c] * 0;
    float largest = high >= -low ? high : -low;
    float scale = largest / (format == INT8 ? 127 : format == FP8 ? 448 : 7.5f);
    _Float16 stored = (_Float16)(scale + broken);
    scales[at] = stored;
    float divisor = (float)stored, keep = isfinite(divisor) && divisor != 0 ? 1 : 0;
    if (!keep) divisor = 1;
    float codes[MAX_DIM];
    for (int64_t c = 0; c < d; c++) codes[c] = keep ? x[c] / divisor : 0;
    if (format == INT8) {
        int8_t *out = (int8_t *)rows + at * d;
        for (int64_t c = 0; c < d; c++) out[c] = (int8_t)fminf(fmaxf(rintf(codes[c]), -127), 127);
    } else if (format == FP8) {
        uint8_t *out = (uint8_t *)rows + at * d;
        for (int64_t c = 0; c < d; c++) out[c] = to_e4m3(fminf(fmaxf(codes[c], -448), 448));
    } else {
        uint8_t *out = (uint8_t *)rows + at * (d / 2);
        for (int64_t c = 0; c < d / 2; c++) {
            int first = (int)fminf(fmaxf(floorf(codes[c]), -8), 7) + 8;
            int second = (int)fminf(fmaxf(floorf(codes[c + d / 2]), -8), 7) + 8;
            out[c] = (uint8_t)(first | second << 4);
        }
    }
}

// Channels a and b become a + b and a - b, at distance d / 2 and then at 1, 2, 4, ... in each `run` of them. There is
// room for a register behind x.
static void mix(float *x, int64_t d) {
    int64_t half = d / 2, run = half & -half;
    float factor = 1 / sqrtf((float)(2 * run));
    for (int64_t c = 0; c < half; c++) {
        float first = x[c] * factor, second = x[c + half] * factor;
        x[c] = first + second;
        x[c + half] = first - second;
    }
    for (int64_t distance = 1; distance < run && distance < LANES; distance *= 2)
        for (int64_t c = 0; c < d; c += LANES) {
            vi other = lanes() ^ (int32_t)distance, is_second = (lanes() & (int32_t)distance) != 0;
            vf here = load(x + c), there = __builtin_shuffle(here, other);
            store(x + c, there + choose(is_second, -here, here));
        }
    for (int64_t distance = LANES; distance < run; distance *= 2)
        for (int64_t c = 0; c < d; c += c % (2 * distance) == distance - LANES ? distance + LANES : LANES) {
            vf first = load(x + c), second = load(x + c + distance);
            store(x + c, first + second);
            store(x + c + distance, first - second);
        }
}

struct norm {
    const void *x, *weight;
    void *residual, *out;  // residual may be null
    int64_t num_tokens, hidden, x_stride, residual_stride, num_threads;
    float eps;
};

struct gated {
    const void *gate_up;
    void *out;
    int64_t num_tokens, inner, stride, gelu, num_threads;  // gelu 0: silu
};

struct rotary {
    void *q;
    const void *k, *v, *q_norm, *k_norm;  // norms may be null
    const float *cos_sin;
    const int64_t *positions, *slot_mapping;
    void *k_cache, *v_cache;
    _Float16 *k_scale, *v_scale;
    int64_t num_tokens, num_q_heads, num_kv_heads, head_dim, half, block_size, cache_format;
    int64_t q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, num_threads;
    float eps;
};

static int64_t rotary_elements(const struct rotary *a) {
    return a->num_tokens * (a->num_q_heads + 2 * a->num_kv_heads) * a->head_dim;
}

#define T float
#define NAME(op) float32_##op
#define LOAD load
#define STORE store
#define LOAD_1 same
#define STORE_1 same
#include "pointwise_ops.h"
#undef T
#undef NAME
#undef LOAD
#undef STORE
#undef LOAD_1
#undef STORE_1

#define T uint16_t
#define NAME(op) bfloat16_##op
#define LOAD load_bf16
#define STORE store_bf16
#define LOAD_1 from_bf16
#define STORE_1 to_bf16
#include "pointwise_ops.h"
#undef T
#undef NAME
#undef LOAD
#undef STORE
#undef LOAD_1
#undef STORE_1

#define T _Float16
#define NAME(op) float16_##op
#define LOAD load_f16
#define STORE store_f16
#define LOAD_1 from_f16
#define STORE_1 to_f16
#include "pointwise_ops.h"
#undef T
#undef NAME
#undef LOAD
#undef STORE
#undef LOAD_1
#undef STORE_1

// Vectors of floats, as wide as the processor's registers, and the number formats they are read from and written to.

#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vu16 __attribute__((vector_size(2 * LANES)));
typedef uint8_t vu8 __attribute__((vector_size(LANES)));
typedef int8_t vi8 __attribute__((vector_size(LANES)));
typedef _Float16 vf16 __attribute__((vector_size(2 * LANES)));

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3, FP8 = 4, INT4 = 5 };

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

static inline vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline vi load_integers(const int32_t *p) {
    vi v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
#if defined(__AVX512F__)  // GCC would add x to zeros
static inline vf splat(float x) { return (vf)_mm512_set1_ps(x); }
#elif defined(__AVX__)
static inline vf splat(float x) { return (vf)_mm256_set1_ps(x); }
#else
static inline vf splat(float x) { return (vf){} + x; }
#endif
// In a register: GCC would rather read a number again for each of its products, and keep fewer sums in registers.
static inline vf kept(vf x) {
#if defined(__AVX__)
    __asm__("" : "+v"(x));
#endif
    return x;
}
static inline vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
#if defined(__AVX512F__)
static inline vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }  // b if either is NaN
#elif defined(__AVX__)
static inline vf larger(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#else
static inline vf larger(vf a, vf b) { return choose(a > b, a, b); }
#endif

static inline vi lanes(void) {
    vi lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane;
}

static inline float sum_of(vf v) {  // always in this order
    for (int w = LANES / 2; w; w /= 2) v += __builtin_shuffle(v, lanes() ^ w);
    return v[0];
}
static inline float max_of(vf v) {
    for (int w = LANES / 2; w; w /= 2) v = larger(v, __builtin_shuffle(v, lanes() ^ w));
    return v[0];
}

// Lane i of the result is the sum over the lanes of x[i], or the largest of them: neighbours first, then pairs of them, ...
static inline vf sum(vf a, vf b) { return a + b; }
#define DEFINE_FOLD(NAME, JOIN)                                                                    \
    static inline vf NAME(vf x[LANES]) {                                                           \
        vi lane = lanes();                                                                         \
        _Pragma("GCC unroll 4") for (int w = 1; w < LANES; w *= 2) {                               \
            vi second = ((lane & w) != 0) & LANES;                                                 \
            for (int i = 0; i < LANES; i += 2 * w)                                                 \
                x[i] = JOIN(__builtin_shuffle(x[i], x[i + w], lane + second),                      \
                            __builtin_shuffle(x[i], x[i + w], (lane ^ w) + second));               \
        }                                                                                          \
        return x[0];                                                                               \
    }
DEFINE_FOLD(fold, sum)
DEFINE_FOLD(fold_larger, larger)

// 2^x, to 2 units in the last place, up to 2^127; 0 below 2^-126, NaN for NaN. The polynomial is that of exp2f in Cephes
// (Moshier), for an |f| of at most 1/2.
static inline vf exp2_of(vf x) {
    vf bounded = -larger(splat(-127.0f), -x);
    vf shifted = bounded + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    vf whole = shifted - 12582912.0f, f = bounded - whole;
    vf p = splat(1.535336188319500e-4f);
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLE_UQ);  // true for NaN
    return (vf)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)whole);
#else
    return choose(x > -126.0f, (vf)((vu)p + ((vu)shifted << 23)), choose(x == x, (vf){}, x));
#endif
}

// LANES small integers as 32-bit ones. GCC takes the general form apart into many steps where one instruction will do.
#if defined(__AVX512F__)
static inline vu wide_u16(const uint16_t *p) { return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)); }
static inline vu wide_u8(const uint8_t *p) { return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)); }
static inline vi wide_i8(const int8_t *p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)); }
static inline vf to_float(vi x) { return (vf)_mm512_cvtepi32_ps((__m512i)x); }
static inline vf load_f16(const _Float16 *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
#elif defined(__AVX2__) && defined(__F16C__)
static inline vu wide_u16(const uint16_t *p) { return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)); }
static inline vu wide_u8(const uint8_t *p) { return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p)); }
static inline vi wide_i8(const int8_t *p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)); }
static inline vf to_float(vi x) { return (vf)_mm256_cvtepi32_ps((__m256i)x); }
static inline vf load_f16(const _Float16 *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
#else
#define WIDE(NAME, FROM, TO)                     \
    static inline TO NAME(const void *p) {       \
        FROM x;                                  \
        memcpy(&x, p, sizeof x);                 \
        return __builtin_convertvector(x, TO);   \
    }
WIDE(wide_u16, vu16, vu)
WIDE(wide_u8, vu8, vu)
WIDE(wide_i8, vi8, vi)
WIDE(load_f16, vf16, vf)
static inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }
#endif

static inline float from_bf16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline uint16_t to_bf16(float f) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(f != f ? 0x7fc0 : rounded);
}
static inline vf load_bf16(const uint16_t *p) { return (vf)(wide_u16(p) << 16); }
static inline vu bf16_of(vf v) {  // in the lower half of each lane
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(v != v);
    return (nan & 0x7fc0) | (~nan & rounded);
}
static inline void store_bf16(uint16_t *p, vf v) {
    vu16 h = __builtin_convertvector(bf16_of(v), vu16);
    memcpy(p, &h, sizeof h);
}
static inline void store_f16(_Float16 *p, vf v) {
    vf16 h = __builtin_convertvector(v, vf16);
    memcpy(p, &h, sizeof h);
}
static inline vf load_i8(const int8_t *p) { return to_float(wide_i8(p)); }
// The exponent and mantissa of e4m3 in the place of a float's are the value times 2^-120.
static inline vf from_e4m3(vu bits) { return (vf)((bits & 0x80) << 24 | (bits & 0x7f) << 20) * 0x1p120f; }
static inline vf load_e4m3(const uint8_t *p) { return from_e4m3(wide_u8(p)); }
static inline vf from_nibbles(vu bits) { return to_float((vi)(bits & 15)) - 7.5f; }
// The lower (shift 0) or upper (4) halves of LANES bytes, minus 7.5.
static inline vf load_nibbles(const uint8_t *p, int shift) { return from_nibbles(wide_u8(p) >> shift); }
static inline float from_f16(_Float16 h) { return (float)h; }
static inline _Float16 to_f16(float f) { return (_Float16)f; }
static inline float same(float f) { return f; }

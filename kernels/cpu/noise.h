/* The sampler's noise: Philox words of a block of tokens, -log(-log u) of one, and what that is at most. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 256, LANES = 4 };

#define LARGEST_NOISE 16.6356f /* -log(-log u) for the largest u is 16.63553 */

static inline int32_t bits_of(float x) {
    int32_t i;
    memcpy(&i, &x, sizeof i);
    return i;
}

static inline float float_of(int32_t i) {
    float x;
    memcpy(&x, &i, sizeof x);
    return x;
}

/* Philox4x32-10: the words of tokens 4 * counter to 4 * counter + BLOCK - 1, at a place: position, sample index. */
static void philox_block(uint64_t seed, uint32_t counter, uint64_t place, uint32_t *words) {
    for (int i = 0; i < BLOCK / LANES; i++) {
        uint32_t x0 = counter + (uint32_t)i, x1 = (uint32_t)place, x2 = (uint32_t)(place >> 32), x3 = 0;
        uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; round++) {
            uint64_t left = (uint64_t)x0 * 0xD2511F53u, right = (uint64_t)x2 * 0xCD9E8D57u;
            x0 = (uint32_t)(right >> 32) ^ x1 ^ key0;
            x1 = (uint32_t)right;
            x2 = (uint32_t)(left >> 32) ^ x3 ^ key1;
            x3 = (uint32_t)left;
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
        words[LANES * i] = x0;
        words[LANES * i + 1] = x1;
        words[LANES * i + 2] = x2;
        words[LANES * i + 3] = x3;
    }
}

/* In double, since near u = 1/e the outer logarithm takes away what leading digits the inner one has in float. */
static float gumbel(uint32_t bits) { return (float)-log(-log((bits + 0.5) * 0x1p-23)); }

/* At least gumbel(bits): -log(-log u) <= -log(1 - u), as -log u >= 1 - u; and log2 of a float is at least what its
   bits say when read as a number with 23 binary places. The last summand covers all roundings. */
static inline float gumbel_bound(uint32_t bits) {
    float rest = (float)(int32_t)(0x7FFFFF - bits) + 0.5f; /* (1 - u) * 2^23, exact */
    return (150.0f - (float)bits_of(rest) * 0x1p-23f) * 0.69314718f + 1e-3f;
}

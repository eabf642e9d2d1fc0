// Whether there is a matrix unit (AMX of Intel processors), whether this process may use it, and what its users share. Where
// there is none, nor instructions for bfloat16 that make torch's products fast, those are in vectors of rows: linear_lanes.h.

#pragma once
#include <stdint.h>

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512FP16__) && defined(__linux__)
#define HAVE_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

// Linux grants the tile registers to processes that ask for them (Documentation/arch/x86/xstate.rst in its sources). The
// answer holds for the life of the process, so it is asked for once and not in every layer.
static int tiles_granted(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18, UNKNOWN = -1 };
    static int granted = UNKNOWN;
    if (granted == UNKNOWN) granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return granted;
}

// What _tile_loadconfig reads.
struct tile_shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// What was stored before, at `p` too, is stored before, and what is stored behind is stored behind: GCC does not know what
// the instructions on tiles read.
static inline void settle(const void *p) { __asm__ volatile("" : : "r"(p) : "memory"); }

static inline void load_shapes(const struct tile_shapes *shapes) {
    settle(shapes);
    _tile_loadconfig(shapes);
}

// Rows become columns: 16 registers of 16 32-bit numbers.
static inline void turn_pairs(__m512i *x) {
    __m512i y[16];
    for (int i = 0; i < 8; i++) {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        x[4 * i] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
        x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
        x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
        x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {  // 0x88 and 0xdd: the even and the odd quarters of two registers
        y[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
        y[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
        y[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
        y[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88);
        x[4 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0x88);
        x[8 + i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd);
        x[12 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0xdd);
    }
}

#elif defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512BF16__)
#define HAVE_LANES 1
#endif

// Whether there is a matrix unit (AMX of Intel processors), and whether this process may use it.

#pragma once

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
#endif

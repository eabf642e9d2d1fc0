// All-reduce, all-gather and barrier for ranks on one host, over one shared segment. Layout and protocol are described
// in shared_memory_layout.py, which holds the same offsets; shared_memory_python.py is the same without a compiler.

#define _GNU_SOURCE
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

enum { OK = 0, TIMEOUT = 1, ABORTED = 2, DEAD = 3, MISMATCH = 4 };
enum { FLOAT32 = 0, FLOAT64 = 1, BFLOAT16 = 2, FLOAT16 = 3, INT64 = 4, BYTES = 5 };
enum { ABORT_AT = 64, RANKS_AT = 4096, RANK_BYTES = 1024, TAGS_AT = 16, BLOCK = 1024 };

struct ring {
    uint8_t *base;         // the segment
    uint8_t *slots;        // [world_size][2][slot_bytes] in it
    int64_t rank, world_size, slot_bytes;
    int64_t spins;         // pauses before the first sched_yield
    int64_t timeout_ns;    // bound on each wait
    uint64_t seq;          // last piece begun
    int64_t sequence;      // last collective begun, from 1
    const int *pidfds;     // [world_size], -1 where there is none
    uint8_t *missing;      // [world_size], set to 1 by a failure
};

static inline void cpu_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb" ::: "memory");
#endif
}

static inline _Atomic uint64_t *word(const struct ring *g, int64_t at) { return (_Atomic uint64_t *)(g->base + at); }
static inline int64_t line(int64_t rank) { return RANKS_AT + rank * RANK_BYTES; }
static inline uint8_t *slot(const struct ring *g, int64_t rank, uint64_t seq) {
    return g->slots + (rank * 2 + (int64_t)(seq & 1)) * g->slot_bytes;
}
static inline uint64_t arrived(const struct ring *g, int64_t rank) {
    return atomic_load_explicit(word(g, line(rank)), memory_order_acquire);
}
static inline int aborted(const struct ring *g) {
    return atomic_load_explicit(word(g, ABORT_AT), memory_order_acquire) != 0;
}
static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

// Mark the ranks that have not arrived (dead_only: and whose process has ended). How many?
static int mark_missing(struct ring *g, int dead_only) {
    int count = 0;
    for (int64_t r = 0; r < g->world_size; r++) {
        if (arrived(g, r) >= g->seq) continue;
        struct pollfd ended = {.fd = g->pidfds[r], .events = POLLIN};
        if (dead_only && (poll(&ended, 1, 0) <= 0 || !(ended.revents & POLLIN))) continue;
        if (dead_only && arrived(g, r) >= g->seq) continue;  // it arrived, then ended
        g->missing[r] = 1;
        count++;
    }
    return count;
}

static int wait_for(struct ring *g, int64_t peer) {
    for (int64_t i = 0; i < g->spins; i++) {
        if (arrived(g, peer) >= g->seq) return OK;
        cpu_pause();
    }
    int64_t start = now_ns(), next_look = start + 5000000;
    for (int64_t i = 1;; i++) {
        if (arrived(g, peer) >= g->seq) return OK;
        if (aborted(g)) return ABORTED;
        sched_yield();
        if (i % 16) continue;
        int64_t now = now_ns();
        if (now - start > 20000000) {  // nothing will be lost by sleeping after such a wait
            struct timespec nap = {0, 50000};
            nanosleep(&nap, 0);
        }
        if (now < next_look) continue;
        next_look = now + 5000000;
        if (mark_missing(g, 1)) return DEAD;
        if (now - start > g->timeout_ns) return mark_missing(g, 0) ? TIMEOUT : OK;
    }
}

// Publish this rank's piece and wait for everybody's.
static int meet(struct ring *g, uint64_t tag) {
    int64_t tag_at = TAGS_AT + 8 * (int64_t)(g->seq & 1);
    atomic_store_explicit(word(g, line(g->rank) + tag_at), tag, memory_order_relaxed);
    atomic_store_explicit(word(g, line(g->rank)), g->seq, memory_order_release);
    for (int64_t r = 0; r < g->world_size; r++) {
        if (r == g->rank) continue;
        int status = arrived(g, r) >= g->seq ? OK : wait_for(g, r);
        if (status != OK) return status;
        if (atomic_load_explicit(word(g, line(r) + tag_at), memory_order_relaxed) != tag) {
            g->missing[r] = 1;
            return MISMATCH;
        }
    }
    return OK;
}

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

// out = piece of rank 0 + piece of rank 1 + ..., from the left, in TOTAL, rounded once.
#define DEFINE_SUM(NAME, TYPE, TOTAL, LOAD, STORE)                                            \
    static void NAME(const struct ring *g, TYPE *restrict out, int64_t n) {                   \
        for (int64_t at = 0; at < n; at += BLOCK) {                                           \
            TOTAL total[BLOCK];                                                               \
            int64_t m = n - at < BLOCK ? n - at : BLOCK;                                      \
            const TYPE *in = (const TYPE *)slot(g, 0, g->seq) + at;                           \
            for (int64_t i = 0; i < m; i++) total[i] = LOAD(in[i]);                           \
            for (int64_t r = 1; r < g->world_size; r++) {                                     \
                in = (const TYPE *)slot(g, r, g->seq) + at;                                   \
                for (int64_t i = 0; i < m; i++) total[i] += LOAD(in[i]);                      \
            }                                                                                 \
            for (int64_t i = 0; i < m; i++) out[at + i] = STORE(total[i]);                    \
        }                                                                                     \
    }
DEFINE_SUM(sum_float32, float, float, , )
DEFINE_SUM(sum_float64, double, double, , )
DEFINE_SUM(sum_bfloat16, uint16_t, float, from_bf16, to_bf16)
DEFINE_SUM(sum_float16, _Float16, float, (float), (_Float16))
DEFINE_SUM(sum_int64, uint64_t, uint64_t, , )  // unsigned: wraps instead of being undefined

static void sum_piece(const struct ring *g, int dtype, void *out, int64_t num_bytes) {
    switch (dtype) {
    case FLOAT32: sum_float32(g, out, num_bytes / 4); break;
    case FLOAT64: sum_float64(g, out, num_bytes / 8); break;
    case BFLOAT16: sum_bfloat16(g, out, num_bytes / 2); break;
    case FLOAT16: sum_float16(g, out, num_bytes / 2); break;
    case INT64: sum_int64(g, out, num_bytes / 8); break;
    }
}

struct collective {
    struct ring *ring;
    uint8_t *x, *out;
    int64_t num_tokens, token_bytes, dtype;
};

// dtype BYTES gathers x of every rank, num_tokens * token_bytes, into out [world_size][...]; any other sums in place (out == x).
// No bytes are a barrier. Returns OK or what went wrong; the ring's `missing` says who.
int ring_collective(const struct collective *a) {
    struct ring *g = a->ring;
    int64_t num_bytes = a->num_tokens * a->token_bytes, at = 0;
    uint64_t tag = (uint64_t)(a->dtype + 1) << 56 | (uint64_t)num_bytes;
    g->sequence++;
    do {
        int64_t piece = num_bytes - at < g->slot_bytes ? num_bytes - at : g->slot_bytes;
        if (aborted(g)) return ABORTED;
        g->seq++;
        memcpy(slot(g, g->rank, g->seq), a->x + at, (size_t)piece);
        int status = meet(g, tag);
        if (status != OK) return status;
        if (a->dtype != BYTES) sum_piece(g, (int)a->dtype, a->out + at, piece);
        else
            for (int64_t r = 0; r < g->world_size; r++)
                memcpy(a->out + r * num_bytes + at, slot(g, r, g->seq), (size_t)piece);
        at += piece;
    } while (at < num_bytes);
    return OK;
}

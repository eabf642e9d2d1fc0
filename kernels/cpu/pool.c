// Threads that share out the tasks of one call after the other, one set in a process, for all libraries of this folder.
//
// A decode step has some 150 calls, most of them shorter than the time that the system takes to wake a thread, or gives to
// another process. So a call waits for nothing but tasks that have begun: tasks are claimed one by one from a counter, the
// caller claims like everyone else, and a helper that sleeps, or has lost its processor, is not waited for. Helpers look
// for a new call a little while, then sleep.
//
// The counter is one word with the call's number, so that a claim succeeds only if the call is still the one whose task
// and context the helper has read.

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#include "pool.h"

enum {
    AT_ONCE = 0xffff,   // tasks that a counter can tell
    MAX_HELPERS = 255,
    LOOKS = 4000,       // for a new call, or for the end of others' tasks: some 0.2 ms on a Sapphire Rapids
};

static struct {
    _Alignas(64) _Atomic uint64_t counter;  // number of the call << 32 | its tasks << 16 | tasks claimed
    _Atomic(task_function *) task;
    const void *_Atomic context;
    _Atomic int64_t first, threads;  // of the tasks at hand; who may take part
    _Alignas(64) _Atomic int64_t ended;
    _Atomic int sleeping, caller_sleeps;
    int64_t helpers, most_wanted;  // those that run; as many as were ever asked for
    pthread_mutex_t calling, sleep;  // who holds `calling` is the caller
    pthread_cond_t called, all_ended;
} pool = {
    .calling = PTHREAD_MUTEX_INITIALIZER, .sleep = PTHREAD_MUTEX_INITIALIZER,
    .called = PTHREAD_COND_INITIALIZER, .all_ended = PTHREAD_COND_INITIALIZER,
};

static inline uint64_t call_of(uint64_t counter) { return counter >> 32; }
static inline int64_t tasks_of(uint64_t counter) { return counter >> 16 & AT_ONCE; }
static inline int64_t claimed_of(uint64_t counter) { return counter & AT_ONCE; }

static inline void look_again_soon(void) {
#if defined __x86_64__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

// Whether a helper is one of those that the present call asks for; the others sleep through it.
static inline int is_wanted(int64_t thread) { return thread < atomic_load(&pool.threads); }

// Does tasks until none is left, and returns the counter as it was then.
static uint64_t do_tasks(int64_t thread) {
    uint64_t counter = atomic_load(&pool.counter);
    while (claimed_of(counter) < tasks_of(counter)) {
        task_function *task = atomic_load(&pool.task);
        const void *context = atomic_load(&pool.context);
        int64_t i = atomic_load(&pool.first) + claimed_of(counter);
        if (!is_wanted(thread) && call_of(atomic_load(&pool.counter)) == call_of(counter)) break;
        if (!atomic_compare_exchange_weak(&pool.counter, &counter, counter + 1)) continue;
        task(context, i, thread);
        if (atomic_fetch_add(&pool.ended, 1) + 1 == tasks_of(counter) && atomic_load(&pool.caller_sleeps)) {
            pthread_mutex_lock(&pool.sleep);
            pthread_cond_signal(&pool.all_ended);
            pthread_mutex_unlock(&pool.sleep);
        }
        counter = atomic_load(&pool.counter);
    }
    return counter;
}

static void *help(void *number) {
    int64_t thread = (intptr_t)number;
    for (;;) {
        uint64_t call = call_of(do_tasks(thread));
        int looks = is_wanted(thread) ? LOOKS : 0;
        while (looks-- > 0 && call_of(atomic_load_explicit(&pool.counter, memory_order_relaxed)) == call) look_again_soon();
        if (looks >= 0) continue;
        pthread_mutex_lock(&pool.sleep);
        atomic_fetch_add(&pool.sleeping, 1);
        while (call_of(atomic_load(&pool.counter)) == call || !is_wanted(thread)) {
            call = call_of(atomic_load(&pool.counter));
            pthread_cond_wait(&pool.called, &pool.sleep);
        }
        atomic_fetch_sub(&pool.sleeping, 1);
        pthread_mutex_unlock(&pool.sleep);
    }
    return NULL;
}

// A forked process has no helpers yet, and a call that another thread was at is over for it.
static void forget_helpers(void) {
    pool.helpers = pool.most_wanted = 0;
    atomic_store(&pool.counter, (call_of(atomic_load(&pool.counter)) + 1) << 32);
    atomic_store(&pool.sleeping, 0);
    atomic_store(&pool.caller_sleeps, 0);
    pthread_mutex_init(&pool.calling, NULL);
    pthread_mutex_init(&pool.sleep, NULL);
    pthread_cond_init(&pool.called, NULL);
    pthread_cond_init(&pool.all_ended, NULL);
}

static void watch_for_forks(void) { pthread_atfork(NULL, NULL, forget_helpers); }

// Signals are the main thread's, but for those of a thread's own faults. Where the system gives no more threads, those that
// are there do the work.
static void start_helpers(int64_t wanted) {
    pool.most_wanted = wanted;
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_for_forks);
    sigset_t all, before;
    sigfillset(&all);
    for (int i = 0; i < 4; i++) sigdelset(&all, (int[]){SIGSEGV, SIGBUS, SIGFPE, SIGILL}[i]);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pthread_t thread; pool.helpers < wanted && pool.helpers < MAX_HELPERS; pool.helpers++) {
        if (pthread_create(&thread, NULL, help, (void *)(intptr_t)(pool.helpers + 1))) break;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void wait_for_all(int64_t tasks) {
    for (int looks = LOOKS; looks--; look_again_soon())
        if (atomic_load(&pool.ended) == tasks) return;
    pthread_mutex_lock(&pool.sleep);
    atomic_store(&pool.caller_sleeps, 1);
    while (atomic_load(&pool.ended) != tasks) pthread_cond_wait(&pool.all_ended, &pool.sleep);
    atomic_store(&pool.caller_sleeps, 0);
    pthread_mutex_unlock(&pool.sleep);
}

static void share_out_some(int64_t tasks) {
    atomic_store(&pool.ended, 0);
    uint64_t call = (call_of(atomic_load(&pool.counter)) + 1) << 32;
    atomic_store(&pool.counter, call | (uint64_t)tasks << 16);
    if (atomic_load(&pool.sleeping)) {
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_broadcast(&pool.called);
        pthread_mutex_unlock(&pool.sleep);
    }
    do_tasks(0);
    wait_for_all(tasks);
}

void kvshard_share_out(task_function *task, const void *context, int64_t count, int64_t threads) {
    if (threads <= 1 || count <= 1 || pthread_mutex_trylock(&pool.calling)) {
        for (int64_t i = 0; i < count; i++) task(context, i, 0);
        return;
    }
    if (pool.most_wanted < threads - 1) start_helpers(threads - 1);
    atomic_store(&pool.task, task);
    atomic_store(&pool.context, context);
    atomic_store(&pool.threads, threads);
    for (int64_t first = 0; first < count; first += AT_ONCE) {
        atomic_store(&pool.first, first);
        share_out_some(count - first < AT_ONCE ? count - first : AT_ONCE);
    }
    pthread_mutex_unlock(&pool.calling);
}

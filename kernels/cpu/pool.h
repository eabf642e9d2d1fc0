// Tasks shared out over threads that stay (pool.c).

#pragma once
#include <stdint.h>

typedef void task_function(const void *context, int64_t i, int64_t thread);

// Calls task(context, i, thread) once for each i in [0, count), on the calling thread, which is thread 0, and on up to
// threads - 1 others at a time, and returns when all have ended. Where a call is at work already, the caller does all.
void kvshard_share_out(task_function *task, const void *context, int64_t count, int64_t threads);

// Part `part` of n things in so many parts begins here.
static inline int64_t part_start(int64_t n, int64_t part, int64_t parts) { return n * part / parts; }

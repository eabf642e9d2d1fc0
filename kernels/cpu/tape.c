// Plays the calls of a step again; see tape.py.

#include <stdint.h>

struct call {
    int (*function)(const void *arguments);
    const void *arguments;
};

// Returns the number of calls that went well; *status is what the next one returned.
int64_t tape_play(const struct call *calls, int64_t num_calls, int *status) {
    for (int64_t i = 0; i < num_calls; i++)
        if ((*status = calls[i].function(calls[i].arguments))) return i;
    return num_calls;
}

// Plays the calls of a step again; see tape.py.

#include <stdint.h>

struct call {
    int (*function)(const void *arguments);
    const void *arguments;
    int64_t *num_tokens, *num_rows;  // in the arguments; NULL where they have none
};

// Returns the number of calls that went well; *status is what the next one returned.
int64_t tape_play(const struct call *calls, int64_t num_calls, int64_t num_tokens, int64_t num_rows, int *status) {
    for (int64_t i = 0; i < num_calls; i++) {
        if (calls[i].num_tokens) *calls[i].num_tokens = num_tokens;
        if (calls[i].num_rows) *calls[i].num_rows = num_rows;
        if ((*status = calls[i].function(calls[i].arguments))) return i;
    }
    return num_calls;
}

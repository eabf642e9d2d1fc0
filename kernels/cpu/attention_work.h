// How a call of attention is cut into items of work.

#pragma once
#include "attention.h"

// Query positions first_query .. end_query - 1 of a row over some chunks; or, where end_row > row + 1, the one query each of
// rows whose positions of the chunk lie in the same blocks.
struct item {
    int32_t row, end_row, first_query, end_query, first_chunk, end_chunk;
};

// Items, and per row the place of its results, [chunk][query], or -1 where its items write their output themselves.
struct work {
    struct item *items;
    int32_t *partials;
    int64_t num_items, num_partials;
};

static int64_t num_queries(const struct attention *a, int64_t row) { return a->query_start[row + 1] - a->query_start[row]; }

// The chunk of the oldest position that a query of a row sees, and the one behind the last.
static int64_t first_chunk(const struct attention *a, int64_t row, int64_t query) {
    int64_t position = a->context_lens[row] - num_queries(a, row) + query;
    return a->window ? max64(position + 1 - a->window, 0) / CHUNK : 0;
}
static int64_t end_chunk(const struct attention *a, int64_t row, int64_t query) {
    return (a->context_lens[row] - num_queries(a, row) + query) / CHUNK + 1;
}

// The place in the step of query i of an item, and its position.
static int64_t token_of(const struct attention *a, const struct item *it, int64_t i) {
    return it->end_row > it->row + 1 ? a->query_start[it->row + i] : a->query_start[it->row] + it->first_query + i;
}
static int64_t position_of(const struct attention *a, const struct item *it, int64_t i) {
    if (it->end_row > it->row + 1) return a->context_lens[it->row + i] - 1;
    return a->context_lens[it->row] - num_queries(a, it->row) + it->first_query + i;
}
static int64_t queries_of(const struct item *it) {
    return it->end_row > it->row + 1 ? it->end_row - it->row : it->end_query - it->first_query;
}

// Whether a row's results are joined from one for each chunk: it has few queries.
static int is_parted(const struct attention *a, int64_t row, int64_t group) {
    int64_t queries = num_queries(a, row);
    return queries * group <= FEW_ROWS && end_chunk(a, row, queries - 1) - first_chunk(a, row, 0) > 1;
}

// Whether the single queries of a parted row and of the one before it see all of a chunk, in the same blocks.
static int share_chunk(const struct attention *a, int64_t row, int64_t group, int64_t chunk) {
    for (int64_t r = row - 1; r <= row; r++) {
        int64_t context = a->context_lens[r];
        int sees_all = context >= (chunk + 1) * CHUNK && (!a->window || context - a->window <= chunk * CHUNK);
        if (num_queries(a, r) != 1 || !is_parted(a, r, group) || !sees_all) return 0;
    }
    int64_t first = chunk * CHUNK / a->block_size, end = ((chunk + 1) * CHUNK - 1) / a->block_size + 1;
    const int32_t *table = a->block_tables + row * a->table_stride;
    return memcmp(table + first, table - a->table_stride + first, (size_t)(end - first) * 4) == 0;
}

// The items of all rows. A row with few queries gets an item a chunk, so that one long context keeps all threads busy, and
// neighbours that share a chunk meet it together. Returns 1 for want of memory.
static int plan(const struct attention *a, struct work *work) {
    int64_t group = 1, num_tokens = a->query_start[a->num_rows], most = a->num_rows + num_tokens, longest = 0;
    for (int64_t h = 0; h < a->num_kv_heads; h++) group = max64(group, a->first_head[h + 1] - a->first_head[h]);
    int64_t tile = max64(rows_at_once(a) / group, 1), neighbours = tile;
    while (tile > 1 && tile * group > FEW_ROWS && num_tokens / tile * a->num_kv_heads < 4 * a->num_threads) tile /= 2;
    for (int64_t r = 0; r < a->num_rows; r++) {
        most += a->context_lens[r] / CHUNK + 1;
        longest = max64(longest, a->context_lens[r] / CHUNK + 1);
    }
    work->items = malloc((size_t)most * sizeof(struct item));
    work->partials = malloc((size_t)(a->num_rows + longest) * 4);
    if (!work->items || !work->partials) return 1;
    int32_t *covered = work->partials + a->num_rows;  // by chunk, the row behind those of its last item
    memset(covered, 0, (size_t)longest * 4);
    for (int64_t r = 0; r < a->num_rows; r++) {
        int64_t queries = num_queries(a, r), first = first_chunk(a, r, 0), end = end_chunk(a, r, queries - 1);
        work->partials[r] = -1;
        if (!is_parted(a, r, group)) {
            for (int64_t query = 0; query < queries; query += tile) {
                int64_t stop = min64(query + tile, queries);
                work->items[work->num_items++] = (struct item){
                    (int32_t)r, (int32_t)r + 1, (int32_t)query, (int32_t)stop, (int32_t)first_chunk(a, r, query), (int32_t)end_chunk(a, r, stop - 1)
                };
            }
            continue;
        }
        work->partials[r] = (int32_t)work->num_partials;
        work->num_partials += (end - first) * queries;
        for (int64_t chunk = first; chunk < end; chunk++) {
            if (r < covered[chunk]) continue;
            int64_t behind = r + 1;
            while (behind < a->num_rows && behind - r < neighbours && share_chunk(a, behind, group, chunk)) behind++;
            covered[chunk] = (int32_t)behind;
            work->items[work->num_items++] = (struct item){
                (int32_t)r, (int32_t)behind, 0, (int32_t)queries, (int32_t)chunk, (int32_t)chunk + 1
            };
        }
    }
    return 0;
}

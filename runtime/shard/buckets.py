"""Which decode steps a CUDA graph is made for, in pure integers."""

GRAPH_CHUNKS = 2048  # of all rows together: what graphs are planned for, or for one of each row
CHUNK = 512  # tokens: whole chunks of any attention tile (kernels/tiles.py)


def buckets(max_num_seqs: int) -> list[int]:
    """Numbers of rows that have a graph, ascending: 1, 2, 4, 8, then every 16, and `max_num_seqs`."""
    return sorted(
        {n for n in (1, 2, 4, 8, *range(16, max_num_seqs, 16)) if n < max_num_seqs} | {max_num_seqs}
    )


def max_context(num_rows: int, max_model_len: int) -> int:
    """Tokens of the longest row that a bucket of so many is planned for: 16 rows for 65,536, 256 rows for 4,096.

    A graph has a program for each chunk that its rows may have, and memory for what each finds.
    """
    return min(max_model_len, max(GRAPH_CHUNKS // num_rows, 1) * CHUNK)


def planned_context(max_context: int) -> int:
    """Tokens of the rows that attention is planned with: up to the first of a chunk, from which a window reaches back into
    as many chunks as from anywhere."""
    return -(-max_context // CHUNK) * CHUNK + 1

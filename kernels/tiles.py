"""Launch shapes of the Triton kernels: an explicit table instead of run-time tuning, which would make results
depend on timing. No row has been timed on a GPU yet: each was chosen because it compiles for every target without
spills (tests/kernels/test_compile.py).
"""

from dataclasses import dataclass

from .cache import CacheFormat


@dataclass(frozen=True)
class AttentionTile:
    """One launch of the attention kernel.

    min_tile_rows  query positions x query heads of one program are at least this many rows (tl.dot wants 16)
    block_n        cache positions per loop trip
    chunk          cache positions per partial result, a multiple of block_n. Chunks start at multiples of it in the
                   sequence, so it must be the same for decode and prefill rows: it decides the order of sums.
    """

    min_tile_rows: int
    block_n: int
    chunk: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionTiles:
    """The tile of rows with few new tokens, one program per chunk, and of longer ones, all chunks in one program."""

    decode: AttentionTile
    prefill: AttentionTile
    # Rows with at most this many new tokens take the decode tile.
    max_decode_queries: int

    def __post_init__(self) -> None:
        assert self.decode.chunk == self.prefill.chunk, (
            "chunks decide the order of sums: one length for all rows"
        )
        assert self.decode.block_n == self.prefill.block_n, "so do loop trips: one block_n for all rows"
        assert self.decode.chunk % self.decode.block_n == 0, "a chunk is whole loop trips"


@dataclass(frozen=True)
class _Row:
    block_n: int
    prefill_rows: int
    prefill_warps: int
    prefill_stages: int = 2
    decode_warps: int = 4
    decode_stages: int = 2


# (largest head dimension, cache format) -> tiles. What bounds them is registers: a tile of codes is held twice, as
# bytes and as numbers, so int8 and fp8 go no wider than 64 positions, and prefill tiles are low.
# Warps and stages are what the compilers make of it: each row has the numbers that spill on no target with Triton 3.6,
# 3.7 or 3.9, and fit the 64 KiB of shared memory that a block has on AMD.
_ATTENTION: dict[tuple[int, CacheFormat], _Row] = {
    (64, "auto"): _Row(64, 32, 8),
    (64, "int8"): _Row(64, 32, 8, 3),
    (64, "fp8"): _Row(64, 32, 4),
    (64, "int4"): _Row(64, 32, 4),
    (128, "auto"): _Row(64, 32, 8, decode_warps=8),
    (128, "int8"): _Row(64, 32, 8),
    (128, "fp8"): _Row(64, 32, 8, decode_stages=3),
    (128, "int4"): _Row(64, 32, 8, decode_stages=3),
    (256, "auto"): _Row(32, 32, 8),
    (256, "int8"): _Row(32, 32, 8, decode_warps=8),
    (256, "fp8"): _Row(32, 32, 8, decode_warps=8, decode_stages=3),
    (256, "int4"): _Row(32, 32, 8),
}


def attention_tiles(head_dim: int, format: CacheFormat, element_size: int) -> AttentionTiles:
    """The tiles for a head dimension, a cache format and the bytes of an element of q."""
    fitting = [row for (limit, name), row in _ATTENTION.items() if head_dim <= limit and name == format]
    if not fitting:
        limit = max(limit for limit, _ in _ATTENTION)
        raise ValueError(f"head_dim={head_dim} is more than {limit}; no tile is known for it")
    row = fitting[0]
    # float32 takes twice the room of the 16 bits that the rows were chosen for.
    block_n = 32 if element_size > 2 and head_dim > 64 else row.block_n
    return AttentionTiles(
        decode=AttentionTile(16, block_n, 512, num_warps=row.decode_warps, num_stages=row.decode_stages),
        prefill=AttentionTile(
            row.prefill_rows, block_n, 512, num_warps=row.prefill_warps, num_stages=row.prefill_stages
        ),
        max_decode_queries=16,
    )


@dataclass(frozen=True)
class LinearTile:
    """One launch of the product with a weight kept as codes: tokens and rows of a program, groups of 32 channels a trip."""

    block_t: int
    block_n: int
    groups: int
    num_warps: int
    num_stages: int


def linear_tile(num_tokens: int) -> LinearTile:
    """Few tokens: rows are split over many programs, as codes come from memory; many: each code that was read meets 64."""
    if num_tokens <= 16:
        return LinearTile(16, 32, 4, num_warps=4, num_stages=3)
    return LinearTile(64, 64, 2, num_warps=4, num_stages=2)


def rotary_tile(num_kv_heads: int, channels: int) -> int:
    """KV heads per program of rotary and cache write, a power of two: enough for 16-byte loads by a warp or more."""
    return min(1 << (num_kv_heads - 1).bit_length(), max(512 // channels, 1))


def row_tile(columns: int) -> tuple[int, int]:
    """Columns per program (a power of two) and warps of a kernel that holds one row: norms."""
    block = 1 << max(columns - 1, 1).bit_length()
    return block, min(max(block // 512, 1), 16)


# Columns per program of the activation kernel.
ACTIVATION_BLOCK = 1024

# Columns per loop trip and per program of the sampler's kernels.
SAMPLING_BLOCK = 1024
SAMPLING_COLUMNS = 4096
BEST_ROWS = 64  # per program, where the ranks' best scores are compared

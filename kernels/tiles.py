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


# Largest head dimension -> rows and warps of a prefill tile. 64 rows spill beyond head_dim 64 (80 on sm_80, 256 on
# sm_100), these do not.
_PREFILL_ROWS_AND_WARPS = {64: (64, 4), 128: (32, 8), 256: (32, 8)}


def attention_tiles(head_dim: int, format: CacheFormat, element_size: int) -> AttentionTiles:
    """The tiles for a head dimension, a cache format and the bytes of an element of q."""
    fitting = [limit for limit in _PREFILL_ROWS_AND_WARPS if head_dim <= limit]
    if not fitting:
        raise ValueError(
            f"head_dim={head_dim} is more than {max(_PREFILL_ROWS_AND_WARPS)}; no tile is known for it"
        )
    rows, warps = _PREFILL_ROWS_AND_WARPS[fitting[0]]
    block_n = 64 if head_dim * element_size <= 256 else 32
    return AttentionTiles(
        decode=AttentionTile(16, block_n, 512, num_warps=4, num_stages=3),
        prefill=AttentionTile(rows, block_n, 512, num_warps=warps, num_stages=2),
        max_decode_queries=16,
    )


def rotary_tile(num_kv_heads: int, channels: int) -> int:
    """KV heads per program of rotary and cache write, a power of two: enough for 16-byte loads by a warp or more."""
    return min(1 << (num_kv_heads - 1).bit_length(), max(512 // channels, 1))


def row_tile(columns: int) -> tuple[int, int]:
    """Columns per program (a power of two) and warps of a kernel that holds one row: norms."""
    block = 1 << max(columns - 1, 1).bit_length()
    return block, min(max(block // 512, 1), 16)


# Columns per program of the activation kernel.
ACTIVATION_BLOCK = 1024

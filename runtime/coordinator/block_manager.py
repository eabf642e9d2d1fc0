"""Who holds which blocks of the KV cache: ids and counts only, never the data.

Block 0 is never given out, so that padding in a block table points at memory nobody reads.
"""


class BlockManager:
    """Blocks 1 to num_blocks - 1. A block is free again when its last holder gives it back."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, f"num_blocks={num_blocks}: block 0 is never given out"
        self.num_usable = num_blocks - 1
        self._free = list(range(num_blocks - 1, 0, -1))  # given out from the end
        self._num_holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_usable - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` free blocks, each with one holder. The caller checks `num_free` first."""
        assert 0 <= count <= len(self._free), f"{count} blocks wanted, {len(self._free)} are free"
        start = len(self._free) - count
        block_ids = self._free[start:]
        del self._free[start:]
        for block_id in block_ids:
            self._num_holders[block_id] = 1
        return block_ids

    def share(self, block_ids: list[int]) -> None:
        """Add one holder to each of these used blocks."""
        for block_id in block_ids:
            assert self._num_holders[block_id] > 0, f"block {block_id} is free"
            self._num_holders[block_id] += 1

    def free(self, block_ids: list[int]) -> None:
        """Take one holder from each of these used blocks."""
        for block_id in reversed(block_ids):
            assert self._num_holders[block_id] > 0, f"block {block_id} is freed twice"
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] == 0:
                self._free.append(block_id)

    def num_holders(self, block_id: int) -> int:
        return self._num_holders[block_id]

    def check_integrity(self) -> None:
        """Every block is either free or used: free + used == total, and no block is free twice."""
        held = {block_id for block_id, count in enumerate(self._num_holders) if count}
        free = set(self._free)
        assert len(free) == len(self._free), "a block is in the free list twice"
        assert not held & free, f"blocks {sorted(held & free)} are free and held"
        assert held | free == set(range(1, self.num_usable + 1)), "a block is lost, or block 0 was given out"
        assert min(self._num_holders) >= 0, "a block has less than no holder"

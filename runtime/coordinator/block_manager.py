"""Who holds which blocks of the KV cache: ids and counts only, never the data.

A block is used while it has holders. One that nobody holds is free, or cached: its contents have been
published under a hash, and are kept for whoever asks for that hash until the block is needed otherwise.
Block 0 is never given out, so that padding in a block table points at memory nobody reads.
"""

from collections import OrderedDict
from collections.abc import Iterable


class BlockManager:
    """Blocks 1 to num_blocks - 1: free + used + cached. A block may have several holders."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, f"num_blocks={num_blocks}: block 0 is never given out"
        self.num_usable = num_blocks - 1
        self._free = list(range(num_blocks - 1, 0, -1))  # given out from the end
        self._cached: OrderedDict[int, None] = OrderedDict()  # the longest without a holder first
        self._num_holders = [0] * num_blocks
        self._published: dict[bytes, int] = {}  # hash -> block, used or cached
        self._hashes: dict[int, bytes] = {}  # the same the other way round

    @property
    def num_free(self) -> int:
        """Blocks that can be given out: cached ones are, once no other is left."""
        return len(self._free) + len(self._cached)

    def num_free_beside(self, block_ids: list[int]) -> int:
        """Blocks that can be given out once these used or cached ones are shared."""
        return self.num_free - sum(self._num_holders[block_id] == 0 for block_id in block_ids)

    @property
    def num_used(self) -> int:
        return self.num_usable - self.num_free

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with nothing in them, each with one holder. The caller checks `num_free` first.

        What has been cached for longest is given up for them.
        """
        assert 0 <= count <= self.num_free, f"{count} blocks wanted, {self.num_free} are free"
        while len(self._free) < count:
            block_id, _ = self._cached.popitem(last=False)
            del self._published[self._hashes.pop(block_id)]
            self._free.append(block_id)
        start = len(self._free) - count
        block_ids = self._free[start:]
        del self._free[start:]
        for block_id in block_ids:
            self._num_holders[block_id] = 1
        return block_ids

    def share(self, block_ids: list[int]) -> None:
        """Add one holder to each of these used or cached blocks."""
        for block_id in block_ids:
            if self._num_holders[block_id] == 0:
                assert block_id in self._cached, f"block {block_id} is free"
                del self._cached[block_id]
            self._num_holders[block_id] += 1

    def free(self, block_ids: list[int]) -> None:
        """Take one holder from each of these used blocks; they are given up from the last to the first.

        So of a sequence whose blocks come in token order, the end is the first to go, and what is left is
        still a prefix.
        """
        for block_id in reversed(block_ids):
            assert self._num_holders[block_id] > 0, f"block {block_id} is freed twice"
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] == 0:
                if block_id in self._hashes:
                    self._cached[block_id] = None
                else:
                    self._free.append(block_id)

    def num_holders(self, block_id: int) -> int:
        return self._num_holders[block_id]

    def is_published(self, block_id: int) -> bool:
        return block_id in self._hashes

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Let a used block, whose contents never change from here on, be found by its hash.

        Where another block has that hash already, this one stays as it is.
        """
        assert self._num_holders[block_id] > 0, f"block {block_id} is published and nobody holds it"
        if block_hash not in self._published:
            assert block_id not in self._hashes, f"block {block_id} is published under two hashes"
            self._published[block_hash] = block_id
            self._hashes[block_id] = block_hash

    def find(self, block_hash: bytes) -> int | None:
        """The block published under this hash."""
        return self._published.get(block_hash)

    def withdraw(self, hashes: Iterable[bytes]) -> None:
        """Let nobody find these hashes any more; whoever holds their blocks goes on holding them."""
        for block_hash in hashes:
            block_id = self._published.pop(block_hash, None)
            if block_id is not None:
                del self._hashes[block_id]
                if block_id in self._cached:
                    del self._cached[block_id]
                    self._free.append(block_id)

    def check_integrity(self) -> None:
        """free + used + cached == total, and what is published can be found. Raises AssertionError."""
        used = {block_id for block_id, count in enumerate(self._num_holders) if count}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is in the free list twice"
        assert not used & (free | cached), f"blocks {sorted(used & (free | cached))} are held and given up"
        assert not free & cached, f"blocks {sorted(free & cached)} are free and cached"
        assert used | free | cached == set(range(1, self.num_usable + 1)), (
            "a block is lost, or block 0 was given out"
        )
        assert len(free) + self.num_used + len(cached) == self.num_usable
        assert min(self._num_holders) >= 0, "a block has less than no holder"
        assert cached <= self._hashes.keys() <= cached | used, "cached without a hash, or published and free"
        assert self._published == {block_hash: block for block, block_hash in self._hashes.items()}

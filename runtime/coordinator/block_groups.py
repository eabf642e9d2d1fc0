"""The blocks of every layer group: what a row holds in each, and what it gives up when windows move on.

A block table has an entry for every `block_size` tokens of the row, the same in every group. In a window
group the entries that no later query sees are 0: their blocks are given up, and may be filled anew by any
plan sent later, since shards run plans in order.
"""

from .block_manager import BlockManager
from .limits import Limits
from .plan import CopiedBlock
from .request import Request

BlockTables = list[list[int]]  # [layer group][entry]
PASSED = 0  # in a block table: outside the window; block 0 is never given out


class BlockGroups:
    """One BlockManager a layer group, and the rules that hold for all of them together."""

    def __init__(self, limits: Limits) -> None:
        self._block_size = limits.block_size
        self.windows = [group.window for group in limits.layer_groups]
        self._num_layers = [group.num_layers for group in limits.layer_groups]
        self.managers = [BlockManager(num_blocks) for num_blocks in limits.group_blocks]

    @property
    def num_free(self) -> int:
        """Blocks that every group can give out."""
        return min(manager.num_free for manager in self.managers)

    @property
    def num_used_layer_blocks(self) -> int:
        """Blocks in use, each layer's counted for itself."""
        return sum(
            manager.num_used * count for manager, count in zip(self.managers, self._num_layers, strict=True)
        )

    def first_seen(self, window: int | None, num_computed: int) -> int:
        """The first entry of a block table that queries from position `num_computed` on may see."""
        return 0 if window is None else max(num_computed - window + 1, 0) // self._block_size

    def can_admit(self, num_tokens: int, chunk_end: int, found: BlockTables, keep_free: bool) -> bool:
        """Whether there is room for a row of `num_tokens` that begins with `found`.

        In window groups up to the end of its first chunk, or as much of that as they can ever hold. `keep_free`:
        some blocks are to be left for the rows that run, lest it be preempted at once.
        """
        for window, manager, block_ids in zip(self.windows, self.managers, found, strict=True):
            end = num_tokens if window is None else chunk_end
            num_new = -(-end // self._block_size) - len(block_ids)
            reserve = max(manager.num_usable // 100, 1) if keep_free else 0
            if window is not None:
                num_new = max(min(num_new, manager.num_usable - len(_held(block_ids)) - reserve), 1)
            if num_new + reserve > manager.num_free_beside(_held(block_ids)):
                return False
        return True

    def open(self, request: Request, found: BlockTables) -> None:
        """Give a row the blocks it begins with; in groups with full attention also those for all its tokens."""
        assert not request.block_tables, f"{request.request_id} holds blocks already"
        for manager, block_ids in zip(self.managers, found, strict=True):
            manager.share(_held(block_ids))  # before others are allocated, which could take them
        request.block_tables = found
        num_entries = -(-request.num_to_compute // self._block_size)
        for window, manager, block_ids in zip(self.windows, self.managers, found, strict=True):
            if window is None:
                block_ids += manager.allocate(num_entries - len(block_ids))

    def room(self, request: Request) -> int:
        """Tokens for which the tables of a row have entries, or could get them."""
        tables = zip(self.managers, request.block_tables, strict=True)
        return min(len(block_ids) + manager.num_free for manager, block_ids in tables) * self._block_size

    def extend(self, request: Request, num_tokens: int) -> list[tuple[int, int]]:
        """Bring every table of a row up to `num_tokens`; (group, block) of each new entry, in table order."""
        num_entries = -(-num_tokens // self._block_size)
        added = []
        for index, (manager, block_ids) in enumerate(zip(self.managers, request.block_tables, strict=True)):
            new = manager.allocate(max(num_entries - len(block_ids), 0))
            block_ids += new
            added += [(index, block_id) for block_id in new]
        return added

    def extend_by_copy(self, request: Request, source: Request, num_tokens: int) -> list[CopiedBlock]:
        """Bring every table of a row up to `num_tokens`, one entry more, which is to begin as the one of `source`."""
        index = num_tokens // self._block_size
        self.extend(request, num_tokens)
        self.give_up_passed(request, num_tokens)
        tables = zip(source.block_tables, request.block_tables, strict=True)
        return [CopiedBlock(group, old[index], new[index]) for group, (old, new) in enumerate(tables)]

    def capacity(self, request: Request) -> int:
        """Tokens for which every table of a row has entries."""
        return min(map(len, request.block_tables)) * self._block_size

    def give_up_passed(self, request: Request, num_computed: int) -> None:
        """Give up what the queries from position `num_computed` on cannot see."""
        for window, manager, block_ids in zip(self.windows, self.managers, request.block_tables, strict=True):
            first = end = self.first_seen(window, num_computed)
            while first > 0 and block_ids[first - 1] != PASSED:
                first -= 1
            if first < end:
                manager.free(block_ids[first:end])
                block_ids[first:end] = [PASSED] * (end - first)

    def free(self, request: Request) -> None:
        """Give up all blocks of a row."""
        for manager, block_ids in zip(self.managers, request.block_tables, strict=True):
            manager.free(_held(block_ids))
        request.block_tables = []

    def check_integrity(self, holders: list[Request]) -> None:
        """Every group's blocks are held by `holders` and nobody else. Raises AssertionError."""
        for index, manager in enumerate(self.managers):
            manager.check_integrity()
            held: dict[int, int] = {}
            for request in holders:
                for block_id in _held(request.block_tables[index]):
                    held[block_id] = held.get(block_id, 0) + 1
            assert len(held) == manager.num_used, "blocks are held by no request, or by one that gave them up"
            for block_id, count in held.items():
                assert count == manager.num_holders(block_id), f"holders of block {block_id} are miscounted"


def _held(block_ids: list[int]) -> list[int]:
    return [block_id for block_id in block_ids if block_id != PASSED]

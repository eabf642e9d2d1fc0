"""Which row gives up its blocks when none is left."""

from collections.abc import Collection

from .block_groups import BlockGroups
from .request import Request
from .slot_table import SlotTable


def cheapest_victim(
    table: SlotTable, blocks: BlockGroups, block_size: int, settled: Collection[int]
) -> Request:
    """The running request with the fewest tokens to compute again; the last to arrive among equals.

    Tokens in blocks that others hold too are not lost with it; those in its own, even if they can be found
    by their hash, are what the rows that go on will take next. It is never the first to have arrived of
    those that run: so the first of all that are unfinished always goes on, and once it has ended, the
    second is the first. Nor is it one of the slots `settled`, which have got blocks with this plan.
    """
    first = min(request.arrival for request in table.owners.values())

    def cost(request: Request) -> tuple[int, int]:
        num_kept = _num_shared(request, blocks) * block_size
        return max(int(table.num_computed[request.slot]) - num_kept, 0), -request.arrival

    return min(
        (
            request
            for slot, request in table.owners.items()
            if request.arrival != first and slot not in settled
        ),
        key=cost,
    )


def _num_shared(request: Request, blocks: BlockGroups) -> int:
    """Blocks at its beginning that others hold too, in the first layer group; what windows have passed is lost."""
    for index, block_id in enumerate(request.block_tables[0]):
        if blocks.managers[0].num_holders(block_id) <= 1:
            return index
    return len(request.block_tables[0])

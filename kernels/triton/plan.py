"""The work of one attention step as a list of program-sized items, made once a step with numpy."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..host import to_device
from ..metadata import AttentionMetadata, HeadLayout
from ..tiles import AttentionTile, AttentionTiles


@dataclass(frozen=True)
class WorkList:
    """What one launch of the attention kernel does; rows of int32.

    items     [num_items, 5]: row, first query token within the row, first chunk, end of chunks, and the number
              of the partial result that the item writes, or -1 if it covers all chunks and writes the output
    combined  [num_combined, 4]: row, first query token within the row, first partial, number of partials
    """

    tile: AttentionTile
    tile_queries: int
    num_partials: int
    items: Tensor
    combined: Tensor


def plan_work(
    meta: AttentionMetadata, tiles: AttentionTiles, group: int, window: int | None
) -> list[WorkList]:
    """Work lists of the step's decode and prefill rows, those that have any; `group` = padded heads per KV head.

    A row with few new tokens gets an item per chunk, to spread a long context over the device; else an item loops
    over its chunks. Both join the same chunks in the same order, so the choice changes rounding at most.
    """
    few = meta.query_lens_host <= tiles.max_decode_queries
    plans = []
    for tile, rows, by_chunk in ((tiles.decode, few, True), (tiles.prefill, ~few, False)):
        if rows.any():
            plans.append(_work_list(meta, tile, np.flatnonzero(rows), by_chunk, group, window))
    return plans


_NO_QUERY = 1 << 30  # past the end of every row


def refill_work(
    plans: list[WorkList], meta: AttentionMetadata, tiles: AttentionTiles, group: int, window: int | None
) -> None:
    """Rewrites work lists in their place for the lengths that `meta` has now; what is left over becomes idle.

    So launches keep their grids and addresses. The lists were planned for rows at least as long as these.
    """
    fresh = plan_work(meta, tiles, group, window)
    assert len(fresh) == len(plans), "a row has changed between the decode and the prefill tile"
    for kept, new in zip(plans, fresh, strict=True):
        assert new.num_partials <= kept.num_partials, f"{new.num_partials} partial results"
        for target, rows in ((kept.items, new.items), (kept.combined, new.combined)):
            assert len(rows) <= len(target), f"{len(rows)} items, planned for at most {len(target)}"
            target[: len(rows)] = rows
            # An idle program finds no query of its own, and no chunk or partial result to walk: it writes nothing.
            target[len(rows) :] = 0
            target[len(rows) :, 1] = _NO_QUERY


def _work_list(
    meta: AttentionMetadata,
    tile: AttentionTile,
    rows: npt.NDArray[np.int64],
    by_chunk: bool,
    group: int,
    window: int | None,
) -> WorkList:
    tile_queries = max(tile.min_tile_rows // group, 1)
    query_len = meta.query_lens_host[rows].astype(np.int64)
    tiles_of_row = -(-query_len // tile_queries)
    place = np.repeat(np.arange(len(rows)), tiles_of_row)
    query = _count_up(tiles_of_row) * tile_queries
    start = meta.context_lens_host[rows].astype(np.int64)[place] - query_len[place]
    last_position = start + np.minimum(query + tile_queries, query_len[place]) - 1
    first_position = np.zeros_like(start) if window is None else np.maximum(start + query - window + 1, 0)
    first_chunk = first_position // tile.chunk
    end_chunk = last_position // tile.chunk + 1

    num_chunks = end_chunk - first_chunk
    items_of_tile = num_chunks if by_chunk else np.ones_like(num_chunks)
    item_tile = np.repeat(np.arange(len(place)), items_of_tile)
    item_first = first_chunk[item_tile] + _count_up(items_of_tile)
    item_end = item_first + 1 if by_chunk else end_chunk
    in_parts = items_of_tile > 1
    partial = np.where(in_parts[item_tile], np.cumsum(in_parts[item_tile]) - 1, -1)
    items = np.stack([rows[place][item_tile], query[item_tile], item_first, item_end, partial], axis=1)

    parts = items_of_tile[in_parts]
    combined = np.stack([rows[place][in_parts], query[in_parts], np.cumsum(parts) - parts, parts], axis=1)
    device = meta.block_tables.device
    return WorkList(
        tile=tile,
        tile_queries=tile_queries,
        num_partials=int(parts.sum()),
        items=to_device(items.astype(np.int32), device),
        combined=to_device(combined.astype(np.int32), device),
    )


def _count_up(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0, 1, .. counts[0] - 1, 0, 1, .. counts[1] - 1, and so on."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


@lru_cache
def head_groups_table(heads: HeadLayout, device: torch.device) -> Tensor:
    """[Hk, 2] int32: first query head and number of query heads of each KV head."""
    first = 0
    groups = []
    for count in heads.q_per_kv:
        groups.append((first, count))
        first += count
    return torch.tensor(groups, dtype=torch.int32, device=device)

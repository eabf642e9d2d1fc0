"""Metadata and work lists rewritten in their place, as a captured CUDA graph needs them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kvshard.kernels.cache import CacheFormat
from kvshard.kernels.metadata import AttentionMetadata

from .conftest import AttentionCase, Backend, attention_case

LONGEST = (40, 70, 33, 2)
SHORTER = ((1, 70, 17, 1), (16, 3, 32, 2), (40, 33, 1, 1))


def metadata(case: AttentionCase, context_lens: tuple[int, ...], device: str) -> AttentionMetadata:
    return AttentionMetadata.build(
        np.ones(len(context_lens), np.int32),
        np.array(context_lens, np.int32),
        case.block_tables.to(device),
        case.cache.block_size,
        device,
    )


def chunked(backend: Backend, case: AttentionCase) -> dict[str, object]:
    """Chunks of 32 positions, so that the longer rows have several and the shorter ones one."""
    if backend.name != "triton":
        return {}
    from kvshard.kernels.tiles import attention_tiles

    tiles = attention_tiles(case.q.shape[2], case.cache.format, case.q.element_size())
    change = {"block_n": 16, "chunk": 32}
    return {
        "tiles": replace(
            tiles, decode=replace(tiles.decode, **change), prefill=replace(tiles.prefill, **change)
        )
    }


def attend(backend: Backend, case: AttentionCase, meta: AttentionMetadata) -> Tensor:
    cache, q = case.cache.to(backend.device), case.q.to(backend.device)
    out = backend.ops.paged_attention(
        q, cache, meta, case.heads, case.scale, window=case.window, **chunked(backend, case)
    )
    return out.cpu()


@pytest.mark.parametrize(("format", "window"), [("auto", None), ("int8", None), ("auto", 20)])
def test_refilled_metadata_are_those_of_the_step(
    backend: Backend, format: CacheFormat, window: int | None
) -> None:
    case = attention_case((1,) * len(LONGEST), LONGEST, q_per_kv=(2, 1), window=window, format=format)
    meta = metadata(case, LONGEST, backend.device)
    attend(backend, case, meta)
    addresses = [x.data_ptr() for x in (meta.context_lens, meta.block_tables, meta.query_start)]
    for lengths in SHORTER:
        meta.refill(np.array(lengths, np.int32), case.block_tables.to(backend.device))
        assert torch.equal(
            attend(backend, case, meta), attend(backend, case, metadata(case, lengths, backend.device))
        )
    assert addresses == [x.data_ptr() for x in (meta.context_lens, meta.block_tables, meta.query_start)]


def test_launches_keep_their_grids_and_addresses() -> None:
    pytest.importorskip("triton")
    from kvshard.kernels import triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = Backend("triton", triton, device)
    case = attention_case((1,) * len(LONGEST), LONGEST)
    meta = metadata(case, LONGEST, device)
    attend(backend, case, meta)

    def launches() -> list[tuple[int, int, int, int, int]]:
        return [
            (
                work.items.data_ptr(),
                len(work.items),
                work.combined.data_ptr(),
                len(work.combined),
                work.num_partials,
            )
            for plans, _ in meta._prepared.values()
            for work in plans
        ]

    before = launches()
    assert before
    meta.refill(np.array(SHORTER[0], np.int32), case.block_tables.to(device))
    attend(backend, case, meta)
    assert launches() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_reads_the_refilled_step() -> None:
    from kvshard.kernels import triton

    backend = Backend("triton", triton, "cuda")
    case = attention_case((1,) * len(LONGEST), LONGEST)
    cache, q = case.cache.to("cuda"), case.q.to("cuda")
    meta = metadata(case, LONGEST, "cuda")
    options = chunked(backend, case)
    triton.paged_attention(q, cache, meta, case.heads, case.scale, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton.paged_attention(q, cache, meta, case.heads, case.scale, **options)
    for lengths in SHORTER:
        meta.refill(np.array(lengths, np.int32), case.block_tables.to("cuda"))
        graph.replay()
        assert torch.equal(out.cpu(), attend(backend, case, metadata(case, lengths, "cuda")))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [((41, 70, 33, 2), None), ((40, 71, 33, 2), "planned for at most"), ((0, 1, 1, 1), "include")],
)
def test_what_was_not_planned_for_is_refused(lengths: tuple[int, ...], message: str | None) -> None:
    """A row may grow past its own length of before as long as the plan's capacity holds it."""
    case = attention_case((1,) * len(LONGEST), LONGEST)
    meta = metadata(case, LONGEST, "cpu")
    if message is None:
        meta.refill(np.array(lengths, np.int32), case.block_tables)
        return
    with pytest.raises(AssertionError, match=message):
        meta.refill(np.array(lengths, np.int32), case.block_tables)

"""Paged attention of each back end against the definition, on shapes chosen to be awkward."""

import pytest
import torch
from tolerances import assert_within

from kvshard.kernels import reference
from kvshard.kernels.metadata import AttentionMetadata

SHAPES = {
    "decode at block edges": {"query_lens": (1, 1, 1, 1), "context_lens": (1, 15, 16, 17)},
    "decode, ragged lengths": {"query_lens": (1, 1, 1), "context_lens": (3, 300, 40), "q_per_kv": (2, 1)},
    "decode and prefill": {"query_lens": (1, 5, 1, 20), "context_lens": (33, 5, 7, 41), "q_per_kv": (1, 1)},
    "prefill cut in the middle": {"query_lens": (17, 3), "context_lens": (50, 3), "q_per_kv": (4, 4)},
    "block size 32": {"query_lens": (1, 1, 1, 2), "context_lens": (31, 32, 33, 64), "block_size": 32},
    "block size 24": {"query_lens": (1, 3), "context_lens": (49, 25), "block_size": 24, "q_per_kv": (1,)},
    "head_dim 24": {"query_lens": (1, 6), "context_lens": (20, 18), "head_dim": 24},
    "head_dim 80": {"query_lens": (1, 6), "context_lens": (20, 18), "head_dim": 80, "q_per_kv": (1, 3, 2)},
    "head_dim 96": {"query_lens": (1, 2), "context_lens": (20, 18), "head_dim": 96, "q_per_kv": (1,)},
    "head_dim 128": {"query_lens": (1, 6), "context_lens": (70, 6), "head_dim": 128, "q_per_kv": (8,)},
    "window 1": {"query_lens": (1, 4), "context_lens": (40, 20), "window": 1},
    "window of a block": {"query_lens": (1, 1, 20), "context_lens": (16, 17, 60), "window": 16},
    "window inside a block": {
        "query_lens": (1, 30),
        "context_lens": (200, 70),
        "window": 21,
        "q_per_kv": (2, 1),
    },
    "window longer than all": {"query_lens": (1, 4), "context_lens": (40, 20), "window": 1000},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(backend, attention_case, shape, dtype):
    case = attention_case(**shape, dtype=dtype)
    got = case.run(backend.ops.paged_attention, backend.device)
    assert got.is_contiguous()
    assert_within(got, case.run(reference.paged_attention), "attention")


MIXED = {"query_lens": (1, 9, 1), "context_lens": (40, 25, 18), "q_per_kv": (2, 1), "block_size": 16}


def _swapped_blocks(first, second):
    def swap(case):
        tables = case.block_tables.clone()
        tables[first], tables[second] = case.block_tables[second], case.block_tables[first]
        return case.changed(block_tables=tables)

    return swap


MUTATIONS = {
    "blocks of two rows swapped": _swapped_blocks((0, 0), (2, 0)),
    "blocks of a prompt swapped": _swapped_blocks((1, 0), (1, 1)),
    "another row's table": lambda case: case.changed(block_tables=case.block_tables[[1, 0, 2]]),
    "context one short": lambda case: case.changed(context_lens=(39, 24, 17)),
    "context one long": lambda case: case.changed(context_lens=(41, 26, 19)),
    "queries of another row": lambda case: case.changed(query_lens=(2, 8, 1)),
    "scale": lambda case: case.changed(scale=case.scale * 1.1),
    "window": lambda case: case.changed(window=17),
    "heads dealt otherwise": lambda case: case.changed(heads=type(case.heads)((1, 2))),
}


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_wrong_input_fails(backend, attention_case, mutate):
    case = attention_case(**MIXED)
    expected = case.run(reference.paged_attention)
    assert_within(case.run(backend.ops.paged_attention, backend.device), expected, "attention")
    with pytest.raises(AssertionError, match="not close"):
        assert_within(mutate(case).run(backend.ops.paged_attention, backend.device), expected, "attention")


def test_layers_share_one_plan(backend, attention_case):
    """The second layer of a step reuses what the first worked out, and reads its own cache."""
    case = attention_case(**MIXED)
    metas = []

    def twice(q, k_cache, v_cache, meta: AttentionMetadata, heads, scale, window):
        backend.ops.paged_attention(q, k_cache, v_cache, meta, heads, scale, window)
        planned = dict(meta._prepared)
        metas.append((planned, meta._prepared))
        return backend.ops.paged_attention(q, v_cache, k_cache, meta, heads, scale, window)

    got = case.run(twice, backend.device)
    swapped = case.changed(k_cache=case.v_cache, v_cache=case.k_cache)
    assert_within(got, swapped.run(reference.paged_attention), "attention")
    ((before, after),) = metas
    assert before
    assert before.keys() == after.keys()


def test_nan_of_one_row_stays_there(backend, attention_case):
    """A row with NaN keys, a short row padded to its length: only the first becomes NaN."""
    case = attention_case((1, 1, 1), (40, 5, 30))
    expected = case.run(reference.paged_attention)
    case.k_cache[case.block_tables[0, 0].long()] = float("nan")
    got = case.run(backend.ops.paged_attention, backend.device)
    assert got[0].isnan().all()
    assert_within(got[1:], expected[1:], "attention")

"""Paged attention of each back end against the definition, on shapes chosen to be awkward."""

import pytest
import torch
from tolerances import assert_within

from kvshard.kernels import reference
from kvshard.kernels.cache import KVLayer
from kvshard.kernels.cpu import attention as cpu_attention
from kvshard.kernels.metadata import AttentionMetadata

from .processors import OTHER_PROCESSORS, load_for

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
    "window longer than a block": {"query_lens": (1, 70), "context_lens": (200, 140), "window": 70},
    "window longer than all": {"query_lens": (1, 4), "context_lens": (40, 20), "window": 1000},
    "soft cap": {"query_lens": (1, 6), "context_lens": (70, 20), "q_per_kv": (2, 1), "soft_cap": 1.5},
    "sinks": {"query_lens": (1, 6, 1), "context_lens": (70, 20, 1), "q_per_kv": (2, 1), "with_sinks": True},
    "window, cap and sinks": {
        "query_lens": (1, 20),
        "context_lens": (90, 20),
        "q_per_kv": (3, 2),
        "window": 17,
        "soft_cap": 2.0,
        "with_sinks": True,
    },
    "block size 128": {"query_lens": (1, 3), "context_lens": (129, 127), "block_size": 128},
    "head_dim 256": {"query_lens": (1, 5), "context_lens": (33, 9), "head_dim": 256, "q_per_kv": (1,)},
}


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"]
)
QUANTISED = pytest.mark.parametrize("format", ["int8", "fp8", "int4"])


def check(backend, case):
    out, lse = case.run_with_lse(backend.ops.paged_attention, backend.device)
    expected, expected_lse = case.run_with_lse(reference.paged_attention)
    assert out.is_contiguous()
    assert_within(out, expected, "attention")
    assert_within(lse, expected_lse, f"logsumexp of {str(out.dtype).removeprefix('torch.')}")


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(backend, attention_case, shape, dtype):
    check(backend, attention_case(**shape, dtype=dtype))


@QUANTISED
@DTYPES
@pytest.mark.parametrize(
    "name", ["decode, ragged lengths", "prefill cut in the middle", "head_dim 80", "window, cap and sinks"]
)
def test_quantised_matches_reference(backend, attention_case, name, format, dtype):
    """Against the definition on the same stored codes: only what attention itself rounds differs."""
    check(backend, attention_case(**SHAPES[name], format=format, dtype=dtype))


MIXED = {
    "query_lens": (1, 9, 1),
    "context_lens": (40, 25, 18),
    "q_per_kv": (2, 1),
    "soft_cap": 3.0,
    "with_sinks": True,
}


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
    "no soft cap": lambda case: case.changed(soft_cap=None),
    "no sinks": lambda case: case.changed(sinks=None),
    "sinks of other heads": lambda case: case.changed(sinks=case.sinks.roll(1)),
}


def _scales_doubled(case, name):
    cache = case.cache.clone()
    getattr(cache, name).mul_(2)
    return case.changed(cache=cache)


def _halves_swapped(case, name):
    cache = case.cache.clone()
    rows = getattr(cache, name)
    rows.copy_(rows << 4 | rows >> 4)
    return case.changed(cache=cache)


CACHE_MUTATIONS = {
    "key scales": ("int8", lambda case: _scales_doubled(case, "k_scale")),
    "value scales": ("fp8", lambda case: _scales_doubled(case, "v_scale")),
    "key halves": ("int4", lambda case: _halves_swapped(case, "k")),
    "value halves": ("int4", lambda case: _halves_swapped(case, "v")),
}


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_wrong_input_fails(backend, attention_case, mutate):
    case = attention_case(**MIXED)
    expected = case.run(reference.paged_attention)
    assert_within(case.run(backend.ops.paged_attention, backend.device), expected, "attention")
    with pytest.raises(AssertionError, match="not close"):
        assert_within(mutate(case).run(backend.ops.paged_attention, backend.device), expected, "attention")


@pytest.mark.parametrize(("format", "mutate"), CACHE_MUTATIONS.values(), ids=CACHE_MUTATIONS.keys())
def test_wrong_codes_fail(backend, attention_case, format, mutate):
    case = attention_case(**MIXED, format=format)
    expected = case.run(reference.paged_attention)
    assert_within(case.run(backend.ops.paged_attention, backend.device), expected, "attention")
    with pytest.raises(AssertionError, match="not close"):
        assert_within(mutate(case).run(backend.ops.paged_attention, backend.device), expected, "attention")


def test_layers_share_one_plan(backend, attention_case):
    """The second layer of a step reuses what the first worked out, and reads its own cache."""
    if backend.name == "torch":
        pytest.skip("plans nothing")
    case = attention_case(**MIXED)
    swapped = case.changed(cache=KVLayer(case.cache.v, case.cache.k))
    metas = []

    def twice(q, cache, meta: AttentionMetadata, *arguments, **options):
        backend.ops.paged_attention(q, cache, meta, *arguments, **options)
        planned = dict(meta._prepared)
        metas.append((planned, meta._prepared))
        return backend.ops.paged_attention(q, KVLayer(cache.v, cache.k), meta, *arguments, **options)

    assert_within(case.run(twice, backend.device), swapped.run(reference.paged_attention), "attention")
    ((before, after),) = metas
    assert before
    assert before.keys() == after.keys()


@pytest.mark.parametrize("format", ["auto", "int8"])
def test_nan_of_one_row_stays_there(backend, attention_case, format):
    """A row with NaN keys, a short row padded to its length: only the first becomes NaN."""
    case = attention_case((1, 1, 1), (40, 5, 30), format=format)
    expected = case.run(reference.paged_attention)
    case.cache.fill_(float("nan"), case.block_tables[0, :1].tolist())
    got = case.run(backend.ops.paged_attention, backend.device)
    assert got[0].isnan().all()
    assert_within(got[1:], expected[1:], "attention")


@pytest.mark.parametrize("flag", ["-mno-amx-bf16", *OTHER_PROCESSORS])
@pytest.mark.parametrize("format", ["auto", "int8", "fp8", "int4"])
def test_cpu_without_a_matrix_unit(attention_case, monkeypatch, format, flag):
    """What processors without AMX run, bfloat16 in float32 vectors, also where there is one."""
    library = load_for(flag, lambda: cpu_attention.load("attention.c", flag))
    monkeypatch.setattr(cpu_attention, "load", lambda *_: library)
    for name in ("decode and prefill", "window inside a block", "head_dim 80"):
        case = attention_case(**SHAPES[name], dtype=torch.bfloat16, format=format)
        out, lse = case.run_with_lse(cpu_attention.paged_attention)
        expected, expected_lse = case.run_with_lse(reference.paged_attention)
        assert_within(out, expected, "attention")
        assert_within(lse, expected_lse, "logsumexp of bfloat16")

"""A row's attention output has the same bits alone, in any batch and cut into any steps; chunks of the context."""

import numpy as np
import pytest
import torch
from tolerances import assert_within

from kvshard.kernels import reference
from kvshard.kernels.metadata import AttentionMetadata
from kvshard.kernels.tiles import AttentionTile, AttentionTiles

pytest.importorskip("triton")

# Chunks of 32 positions: the shapes below have up to four of them, and stay small for the interpreter.
SMALL = AttentionTiles(
    decode=AttentionTile(16, 16, 32, num_warps=4, num_stages=2),
    prefill=AttentionTile(64, 16, 32, num_warps=4, num_stages=2),
    max_decode_queries=4,
)


@pytest.fixture
def triton_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton_attention():
    from kvshard.kernels.triton.attention import paged_attention

    return paged_attention


def matmul_in_order(a, b, dtype):
    """numpy's, summed from the first product to the last for any number of rows."""
    sums = np.zeros((len(a), b.shape[1]), dtype)
    for k in range(len(b)):
        sums += a[:, k, None] * b[k]
    return sums


FORMATS = pytest.mark.parametrize(
    ("format", "dtype"),
    [("auto", torch.float32), ("auto", torch.bfloat16), ("int8", torch.bfloat16), ("int4", torch.float32)],
    ids=["f32", "bf16", "int8", "int4"],
)


@FORMATS
@pytest.mark.parametrize("window", [None, 1, 31, 40], ids=lambda window: f"window {window}")
def test_chunks_match_reference(triton_attention, triton_device, attention_case, format, dtype, window):
    """Contexts at chunk edges, in parts (decode) and in one program (prefill), some chunks all hidden."""
    case = attention_case(
        (1, 3, 1, 1, 40),
        (32, 33, 97, 1, 100),
        q_per_kv=(2, 1),
        head_dim=24,
        dtype=dtype,
        window=window,
        with_sinks=window == 31,
        format=format,
    )
    out, lse = case.run_with_lse(triton_attention, triton_device, tiles=SMALL)
    expected, expected_lse = case.run_with_lse(reference.paged_attention)
    assert_within(out, expected, "attention")
    assert_within(lse, expected_lse, f"logsumexp of {str(dtype).removeprefix('torch.')}")


def bits_equal(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@FORMATS
def test_a_row_alone_and_in_a_batch(backend, attention_case, format, dtype):
    """Bit for bit, output and logsumexp, in each back end."""
    case = attention_case(
        (1, 1, 5, 1, 17), (70, 300, 20, 5, 33), q_per_kv=(2, 1), head_dim=24, dtype=dtype, format=format
    )
    together = case.run_with_lse(backend.ops.paged_attention, backend.device)
    for row, begin in enumerate((0, 1, 2, 7, 8)):
        alone = case.alone(row).run_with_lse(backend.ops.paged_attention, backend.device)
        assert bits_equal(alone, [x[begin : begin + case.query_lens[row]] for x in together])


@pytest.mark.parametrize(
    ("query_lens", "context_lens", "options"),
    [
        ((2, 16, 9), (700, 1200, 513), {"q_per_kv": (3, 3), "head_dim": 64}),
        ((67, 65), (935, 105), {"q_per_kv": (4,), "head_dim": 64, "window": 30}),
        ((13, 37, 41), (51, 76, 41), {"q_per_kv": (4,), "head_dim": 128, "dtype": torch.float16}),
        ((40, 1), (1500, 2000), {"q_per_kv": (5,), "dtype": torch.bfloat16, "format": "fp8"}),
        ((2, 16, 9), (700, 1200, 513), {"q_per_kv": (3, 3), "head_dim": 64, "dtype": torch.bfloat16}),
        (
            (35, 30),
            (600, 105),
            {"q_per_kv": (1, 4), "dtype": torch.bfloat16, "format": "int8", "window": 30, "soft_cap": 4.0},
        ),
        ((11, 1), (90, 530), {"q_per_kv": (2,), "head_dim": 80, "dtype": torch.bfloat16, "format": "int4"}),
    ],
    ids=["few queries", "window", "f16", "fp8", "bf16", "bf16, int8, window", "bf16, int4"],
)
def test_cut_and_batched_on_cpu(attention_case, query_lens, context_lens, options):
    """Long contexts, several threads: a row alone, in a batch, and a query at a time."""
    from kvshard.kernels import cpu

    case = attention_case(query_lens, context_lens, **options, seed=152)
    torch.set_num_threads(2)
    together = case.run_with_lse(cpu.paged_attention)
    begin = 0
    for row, length in enumerate(query_lens):
        torch.set_num_threads(1 + row % 2)
        alone = case.alone(row)
        assert bits_equal(
            alone.run_with_lse(cpu.paged_attention), [x[begin : begin + length] for x in together]
        )
        for query in range(length):
            one = alone.changed(
                q=alone.q[query : query + 1],
                query_lens=(1,),
                context_lens=(context_lens[row] - length + query + 1,),
            )
            place = slice(begin + query, begin + query + 1)
            assert bits_equal(one.run_with_lse(cpu.paged_attention), [x[place] for x in together])
        begin += length


@pytest.mark.parametrize("window", [None, 700], ids=lambda window: f"window {window}")
@pytest.mark.parametrize(
    ("format", "dtype"),
    [("auto", torch.float32), ("auto", torch.bfloat16), ("int8", torch.bfloat16)],
    ids=["f32", "bf16", "int8"],
)
def test_rows_that_share_blocks_on_cpu(attention_case, format, dtype, window):
    """Neighbours with the same blocks of a chunk meet it together, and have the bits of each alone."""
    from kvshard.kernels import cpu

    contexts = (700, 1100, 1030, 513, 600, 900, 1500, 540, 512, 40)
    case = attention_case((1,) * 10, contexts, q_per_kv=(3, 2), dtype=dtype, format=format, window=window)
    tables = case.block_tables
    tables[0:9, :32] = tables[1, :32]  # the first 512 positions
    tables[1:3] = tables[1]  # all: the next 512, and some more, which row 2 does not see all of
    tables[5, 17] = case.alone(6).block_tables[0, 80]  # of these nobody else has one
    torch.set_num_threads(2)
    together = case.run_with_lse(cpu.paged_attention)
    expected = case.run_with_lse(reference.paged_attention)
    assert_within(together[0], expected[0], "attention")
    for row in range(10):
        alone = case.alone(row).run_with_lse(cpu.paged_attention)
        assert bits_equal(alone, [x[row : row + 1] for x in together]), f"row {row}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("group", [17, 33, 48, 130])
def test_large_groups_on_cpu(attention_case, group, dtype):
    """More query heads of one KV head than there are rows in a tile, a narrow item, or any item."""
    from kvshard.kernels import cpu

    case = attention_case((1, 3, 1), (5, 70, 600), q_per_kv=(group,), dtype=dtype)
    together = case.run_with_lse(cpu.paged_attention)
    assert_within(together[0], case.run(reference.paged_attention), "attention")
    for row, begin, end in ((0, 0, 1), (1, 1, 4), (2, 4, 5)):
        alone = case.alone(row).run_with_lse(cpu.paged_attention)
        assert bits_equal(alone, [x[begin:end] for x in together])


@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
@pytest.mark.parametrize("block_size", [8, 16, 24])
def test_many_queries_on_cpu(attention_case, head_dim, block_size):
    """Items of all the rows they can have, of wide heads, over blocks that do not divide what is read at a time."""
    from kvshard.kernels import cpu

    case = attention_case(
        (150,), (230,), q_per_kv=(4,), head_dim=head_dim, block_size=block_size, dtype=torch.bfloat16
    )
    torch.set_num_threads(1)
    whole = case.run_with_lse(cpu.paged_attention)
    assert_within(whole[0], case.run(reference.paged_attention), "attention")
    for query in (0, 31, 32, 149):
        one = case.changed(
            q=case.q[query : query + 1], query_lens=(1,), context_lens=(230 - 150 + query + 1,)
        )
        assert bits_equal(one.run_with_lse(cpu.paged_attention), [x[query : query + 1] for x in whole])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_more_neighbours_than_an_item_has_rows_on_cpu(attention_case, dtype):
    from kvshard.kernels import cpu

    num_rows = 40  # of 4 query heads: 160 rows
    case = attention_case((1,) * num_rows, (520,) * num_rows, q_per_kv=(4,), dtype=dtype, block_size=24)
    case.block_tables[:, :22] = case.block_tables[0, :22]  # 528 positions
    together = case.run_with_lse(cpu.paged_attention)
    for row in (0, 7, 8, 31, 32, 39):
        alone = case.alone(row).run_with_lse(cpu.paged_attention)
        assert bits_equal(alone, [x[row : row + 1] for x in together])


@pytest.mark.parametrize("format", ["auto", "fp8", "int4"])
@pytest.mark.parametrize("window", [None, 21], ids=lambda window: f"window {window}")
def test_a_prompt_cut_into_steps(
    triton_attention, triton_device, attention_case, window, format, monkeypatch
):
    """40 new tokens at once, and as steps of 1, 3, 16 and 20: decode tiles, prefill tiles, chunks in parts.

    Triton's interpreter takes tl.dot from numpy, whose BLAS sums in an order that follows the number of rows
    on processors without AVX-512.
    """
    monkeypatch.setattr(np, "matmul", matmul_in_order)
    case = attention_case(
        (40,), (70,), q_per_kv=(3, 1), head_dim=24, window=window, with_sinks=True, format=format
    )
    whole = case.run_with_lse(triton_attention, triton_device, tiles=SMALL)
    begin = 0
    for size in (1, 3, 16, 20):
        end = begin + size
        step = case.changed(q=case.q[begin:end], query_lens=(size,), context_lens=(30 + end,))
        got = step.run_with_lse(triton_attention, triton_device, tiles=SMALL)
        assert bits_equal(got, [x[begin:end] for x in whole])
        begin = end
    assert begin == 40


def test_work_list_skips_what_no_query_sees():
    """Decode rows get an item per chunk, prefill tiles one item; chunks before the window get none."""
    from kvshard.kernels.triton.plan import plan_work

    meta = AttentionMetadata.build(
        np.array([1, 2, 33], dtype=np.int32),
        np.array([100, 30, 64], dtype=np.int32),
        torch.zeros(3, 7, dtype=torch.int32),
        16,
        "cpu",
    )
    decode, prefill = plan_work(meta, SMALL, group=4, window=None)
    assert decode.tile_queries == 4
    assert decode.items.tolist() == [
        [0, 0, 0, 1, 0],
        [0, 0, 1, 2, 1],
        [0, 0, 2, 3, 2],
        [0, 0, 3, 4, 3],
        [1, 0, 0, 1, -1],
    ]
    assert decode.combined.tolist() == [[0, 0, 0, 4]]
    # 33 queries at positions 31 to 63, 16 a tile.
    assert prefill.items.tolist() == [[2, 0, 0, 2, -1], [2, 16, 0, 2, -1], [2, 32, 0, 2, -1]]
    assert prefill.num_partials == 0
    decode, prefill = plan_work(meta, SMALL, group=4, window=10)
    # The query at position 99 sees 90 to 99; those of row 1 see 19 to 29; tiles of row 2 start at 22, 38 and 54.
    assert decode.items.tolist() == [[0, 0, 2, 3, 0], [0, 0, 3, 4, 1], [1, 0, 0, 1, -1]]
    assert prefill.items.tolist() == [[2, 0, 0, 2, -1], [2, 16, 1, 2, -1], [2, 32, 1, 2, -1]]

"""The door: dispatch by device, and one clear message for an argument that does not fit."""

import numpy as np
import pytest
import torch

from kvshard.kernels import ops

ROWS = torch.zeros(4, 2, 16, 8)
GAPPY_ROWS = torch.zeros(4, 16, 2, 8).transpose(1, 2)
CODES = torch.zeros(4, 2, 16, 8, dtype=torch.int8)
SCALES = torch.ones(4, 2, 16, dtype=torch.float16)
CACHE = ops.KVLayer(ROWS, ROWS)
Q = torch.zeros(3, 4, 8)
KV = torch.zeros(3, 2, 8)
LONGS = torch.zeros(3, dtype=torch.int64)
ANGLES = torch.zeros(9, 8)
META = ops.AttentionMetadata.build(
    np.array([1, 2], dtype=np.int32),
    np.array([5, 2], dtype=np.int32),
    torch.tensor([[1], [2]], dtype=torch.int32),
    16,
    "cpu",
)
HEADS = ops.HeadLayout((2, 2))

BAD_CALLS = {
    "weight: expected shape [24] torch.float32 on cpu, got [25]": lambda: ops.rms_norm(
        torch.zeros(3, 24), torch.zeros(25), 1e-5
    ),
    "x: expected shape [T, H]": lambda: ops.rms_norm(torch.zeros(24), torch.zeros(24), 1e-5),
    "x: expected shape with adjacent last elements": lambda: ops.rms_norm(
        torch.zeros(24, 3).t(), torch.zeros(24), 1e-5
    ),
    "weight: expected shape with adjacent last elements": lambda: ops.rms_norm(
        torch.zeros(3, 24), torch.zeros(48)[::2], 1e-5
    ),
    "positions: expected shape with adjacent last elements": lambda: ops.rotary_kv_write(
        Q, KV, KV, ANGLES, torch.zeros(6, dtype=torch.int64)[::2], CACHE, LONGS
    ),
    "cos_sin: expected a contiguous tensor": lambda: ops.rotary_kv_write(
        Q, KV, KV, torch.zeros(18, 8)[::2], LONGS, CACHE, LONGS
    ),
    "sinks: expected shape with adjacent last elements": lambda: ops.paged_attention(
        Q, CACHE, META, HEADS, 1.0, sinks=torch.zeros(8)[::2]
    ),
    "residual: expected shape [3, 24] torch.float32 on cpu, got [3, 24] torch.bfloat16": lambda: (
        ops.add_rms_norm(torch.zeros(3, 24), torch.zeros(3, 24, dtype=torch.bfloat16), torch.zeros(24), 1e-5)
    ),
    "positions: expected shape [3] torch.int64": lambda: ops.rotary_kv_write(
        Q, KV, KV, ANGLES, LONGS.int(), CACHE, LONGS
    ),
    "k: expected shape [3, Hk, 8]": lambda: ops.rotary_kv_write(Q, KV[:2], KV, ANGLES, LONGS, CACHE, LONGS),
    "even rotary_dim <= 8], got [9, 10]": lambda: ops.rotary_kv_write(
        Q, KV, KV, torch.zeros(9, 10), LONGS, CACHE, LONGS
    ),
    "cache.k: expected shape [num_blocks, 4, block_size, 8]": lambda: ops.rotary_kv_write(
        Q, Q, Q, ANGLES, LONGS, CACHE, LONGS
    ),
    "cache.k: expected a contiguous tensor": lambda: ops.rotary_kv_write(
        Q, KV, KV, ANGLES, LONGS, ops.KVLayer(GAPPY_ROWS, ROWS), LONGS
    ),
    "q_norm, k_norm: expected both or none": lambda: ops.rotary_kv_write(
        Q, KV, KV, ANGLES, LONGS, CACHE, LONGS, q_norm=torch.zeros(8)
    ),
    "gate_up: expected shape [T, 2 * I], got [3, 5]": lambda: ops.silu_mul(torch.zeros(3, 5)),
    "q: expected shape [3, 4, D]": lambda: ops.paged_attention(Q[:2], CACHE, META, HEADS, 1.0),
    "cache.k: expected shape [num_blocks, 2, 16, 8]": lambda: ops.paged_attention(
        Q, ops.KVLayer(ROWS[:, :1], ROWS), META, HEADS, 1.0
    ),
    "cache.v: expected a contiguous tensor": lambda: ops.paged_attention(
        Q, ops.KVLayer(ROWS, GAPPY_ROWS), META, HEADS, 1.0
    ),
    "cache.k_scale: expected a tensor with a cache of torch.int8, got None": lambda: ops.paged_attention(
        Q, ops.KVLayer(CODES, CODES), META, HEADS, 1.0
    ),
    "cache.v_scale: expected shape [4, 2, 16] torch.float16": lambda: ops.paged_attention(
        Q, ops.KVLayer(CODES, CODES, SCALES, SCALES.float()), META, HEADS, 1.0
    ),
    "soft_cap: expected more than 0, got 0.0": lambda: ops.paged_attention(
        Q, CACHE, META, HEADS, 1.0, soft_cap=0.0
    ),
    "sinks: expected shape [4] torch.float32": lambda: ops.paged_attention(
        Q, CACHE, META, HEADS, 1.0, sinks=torch.zeros(3)
    ),
    "lse: expected shape [3, 4] torch.float32": lambda: ops.paged_attention(
        Q, CACHE, META, HEADS, 1.0, lse=torch.zeros(3, 2)
    ),
    "window: expected at least 1, got 0": lambda: ops.paged_attention(Q, CACHE, META, HEADS, 1.0, window=0),
    "device: expected one of cuda, cpu, got meta": lambda: ops.silu_mul(torch.zeros(3, 4, device="meta")),
}


@pytest.mark.parametrize("message", BAD_CALLS.keys())
def test_a_misfit_is_refused(message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the whole message is checked below)
        BAD_CALLS[message]()
    assert message in str(raised.value)


def test_cpu_tensors_go_to_the_cpu_back_end():
    out = ops.paged_attention(Q, CACHE, META, HEADS, 1.0)
    assert torch.equal(out, torch.zeros(3, 4, 8))
    assert torch.equal(ops.silu_mul(torch.ones(2, 2)), torch.ones(2, 1).sigmoid())


@pytest.mark.parametrize(
    ("query_lens", "context_lens", "message"),
    [
        ([1, 3], [5, 2], "include this step's tokens"),
        ([1, 0], [5, 2], "at least one new token"),
        ([1, 1], [5, 17], "cannot hold a context of 17"),
        ([1], [5], "1 rows, 2 block tables"),
    ],
)
def test_metadata_checks_the_hosts_counts(query_lens, context_lens, message):
    with pytest.raises(AssertionError, match=message):
        ops.AttentionMetadata.build(
            np.array(query_lens), np.array(context_lens), META.block_tables, 16, "cpu"
        )


def test_head_layout():
    assert (HEADS.num_q_heads, HEADS.num_kv_heads, HEADS.is_even) == (4, 2, True)
    assert not ops.HeadLayout((2, 3, 1)).is_even
    with pytest.raises(AssertionError, match="has a query head"):
        ops.HeadLayout((2, 0))

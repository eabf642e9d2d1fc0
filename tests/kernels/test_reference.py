"""The definitions themselves, against loops over single numbers in double precision."""

import math

import torch

from kvshard.kernels import reference

WIDE = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def close(got, expected):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=WIDE), atol=1e-12, rtol=1e-12)


def naive_norm(rows, weight, eps):
    out = []
    for row in rows:
        mean_square = math.fsum(value * value for value in row) / len(row)
        out.append([value / math.sqrt(mean_square + eps) * w for value, w in zip(row, weight, strict=True)])
    return out


def test_norms():
    x, residual, weight = rand(3, 7), rand(3, 7, seed=1), rand(7, seed=2)
    close(reference.rms_norm(x, weight, 1e-3), naive_norm(x.tolist(), weight.tolist(), 1e-3))
    total = [
        [a + b for a, b in zip(*rows, strict=True)]
        for rows in zip(x.tolist(), residual.tolist(), strict=True)
    ]
    close(reference.add_rms_norm(x, residual, weight, 1e-3), naive_norm(total, weight.tolist(), 1e-3))
    close(residual, total)


def test_rotary_is_a_complex_rotation():
    """Channel c and c + 3 of a head as real and imaginary part, times exp(i * angle)."""
    q, k = rand(4, 2, 8), rand(4, 1, 8, seed=1)
    angles = torch.arange(9)[:, None] * torch.tensor([1.0, 0.5, 0.25])
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = torch.tensor([8, 0, 3, 3])
    turn = torch.complex(cos_sin[positions, :3].double(), cos_sin[positions, 3:].double())[:, None]
    expected = [torch.complex(x[..., :3], x[..., 3:6]) * turn for x in (q, k)]
    rest = q[..., 6:].clone()
    reference.rotary(q, k, cos_sin, positions)
    for got, wanted in zip((q, k), expected, strict=True):
        torch.testing.assert_close(got[..., :3], wanted.real, atol=1e-12, rtol=0)
        torch.testing.assert_close(got[..., 3:6], wanted.imag, atol=1e-12, rtol=0)
    assert torch.equal(q[..., 6:], rest)


def test_kv_write():
    k, v = rand(3, 2, 4), rand(3, 2, 4, seed=1)
    caches = torch.zeros(2, 5, 2, 8, 4, dtype=WIDE)
    reference.kv_write(k, v, caches[0], caches[1], torch.tensor([8, -1, 39]))
    expected = torch.zeros(2, 5, 2, 8, 4, dtype=WIDE)
    expected[0, 1, :, 0], expected[1, 1, :, 0] = k[0], v[0]
    expected[0, 4, :, 7], expected[1, 4, :, 7] = k[2], v[2]
    assert torch.equal(caches, expected)


def test_silu_mul():
    gate_up = rand(2, 6)
    expected = [
        [g / (1 + math.exp(-g)) * u for g, u in zip(r[:3], r[3:], strict=True)] for r in gate_up.tolist()
    ]
    close(reference.silu_mul(gate_up), expected)


def naive_attention(case):
    """One query, one head and one position at a time, over Python floats."""
    out = []
    token = 0
    block_size = case.k_cache.shape[2]
    kv_of_q = [kv for kv, count in enumerate(case.heads.q_per_kv) for _ in range(count)]
    for row, (query_len, context_len) in enumerate(zip(case.query_lens, case.context_lens, strict=True)):
        for position in range(context_len - query_len, context_len):
            first = 0 if case.window is None else max(0, position - case.window + 1)
            out.append([])
            for head, kv in enumerate(kv_of_q):
                query = case.q[token, head].tolist()
                logits, values = [], []
                for j in range(first, position + 1):
                    block = int(case.block_tables[row, j // block_size])
                    key = case.k_cache[block, kv, j % block_size].tolist()
                    values.append(case.v_cache[block, kv, j % block_size].tolist())
                    logits.append(case.scale * math.fsum(a * b for a, b in zip(query, key, strict=True)))
                weights = [math.exp(logit - max(logits)) for logit in logits]
                total = math.fsum(weights)
                channels = zip(*values, strict=True)
                out[-1].append(
                    [math.fsum(w * x for w, x in zip(weights, c, strict=True)) / total for c in channels]
                )
            token += 1
    return out


def test_paged_attention(attention_case):
    for window in (None, 3):
        case = attention_case(
            (1, 4, 3), (9, 6, 3), q_per_kv=(2, 1), head_dim=3, block_size=4, dtype=WIDE, window=window
        )
        close(case.run(reference.paged_attention), naive_attention(case))

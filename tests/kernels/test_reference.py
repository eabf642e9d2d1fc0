"""The definitions themselves, against loops over single numbers in double precision."""

import math

import pytest
import torch

from kvshard.kernels import reference
from kvshard.kernels.cache import KVLayer

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


def cache_of(format, num_blocks, heads, block_size, head_dim):
    cache = KVLayer.empty(format, (num_blocks, heads, block_size, head_dim), WIDE, "cpu")
    for tensor in cache.tensors:
        tensor.zero_()
    return cache


def test_rotary_is_a_complex_rotation():
    """Channel c and c + 3 of a head as real and imaginary part, times exp(i * angle); stored where the slot says."""
    q, k, v = rand(4, 2, 8), rand(4, 1, 8, seed=1), rand(4, 1, 8, seed=2)
    angles = torch.arange(9)[:, None] * torch.tensor([1.0, 0.5, 0.25])
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions, slots = torch.tensor([8, 0, 3, 3]), torch.tensor([5, -1, 11, 6])
    turn = torch.complex(cos_sin[positions, :3].double(), cos_sin[positions, 3:].double())[:, None]
    expected = [torch.complex(x[..., :3], x[..., 3:6]) * turn for x in (q, k)]
    before = q.clone(), k.clone()
    cache = cache_of("auto", 3, 1, 4, 8)
    reference.rotary_kv_write(q, k, v, cos_sin, positions, cache, slots)
    keys = torch.stack([cache.k[slot // 4, :, slot % 4] for slot in slots.tolist()])
    for got, wanted, old in ((q, expected[0], before[0]), (keys, expected[1], before[1])):
        stored = slots >= 0 if got is keys else slots > -2
        torch.testing.assert_close(got[stored][..., :3], wanted.real[stored], atol=1e-12, rtol=0)
        torch.testing.assert_close(got[stored][..., 3:6], wanted.imag[stored], atol=1e-12, rtol=0)
        assert torch.equal(got[stored][..., 6:], old[stored][..., 6:])
    assert torch.equal(k, before[1])
    assert torch.equal(cache.v[1, :, 1], v[0])
    assert cache.v.count_nonzero() == 3 * 8


def test_qk_norm_comes_first():
    q, k, weights = rand(2, 2, 4), rand(2, 1, 4, seed=1), rand(2, 4, seed=2)
    cos_sin = torch.tensor(
        [[0.0, 1.0, 1.0, 0.0]]
    )  # the first pair turns by 90 degrees, the second not at all
    normed = torch.tensor(naive_norm(q.view(-1, 4).tolist(), weights[0].tolist(), 1e-3), dtype=WIDE)
    reference.rotary_kv_write(
        q,
        k,
        k,
        cos_sin,
        torch.zeros(2, dtype=torch.int64),
        cache_of("auto", 1, 1, 4, 4),
        torch.tensor([-1, -1]),
        q_norm=weights[0],
        k_norm=weights[1],
        eps=1e-3,
    )
    expected = torch.stack([-normed[:, 2], normed[:, 1], normed[:, 0], normed[:, 3]], dim=1)
    torch.testing.assert_close(q.view(-1, 4), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "half_step"),
    [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 16 / 448), (torch.uint8, 1 / 8)],
    ids=["int8", "fp8", "int4"],
)
def test_codes_are_nearest(dtype, half_step):
    """Every value is met within half a step (a step at the clamped end), and the largest exactly or nearly so."""
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(3))
    codes, scale = reference.quantised(x, dtype)
    assert codes.shape == (50, 12 if dtype == torch.uint8 else 24)
    back = reference.dequantised(codes, scale)
    largest = x.abs().amax(1, keepdim=True).double()
    assert ((back - x).abs() <= largest * half_step * 1.01).all()
    at = x.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(back.gather(1, at), x.gather(1, at).double(), rtol=2**-10, atol=0)


def test_int4_halves():
    """Channels c and c + 2 share byte c; code n is the value (n - 7.5) * scale."""
    codes, scale = reference.quantised(
        torch.tensor([[7.5, 1.0, -2.0, 0.0], [-7.5, 7.0, 3.0, 0.0]]), torch.uint8
    )
    assert scale.tolist() == [1.0, 1.0]
    assert codes.tolist() == [[15 | 6 << 4, 9 | 8 << 4], [0 | 11 << 4, 15 | 8 << 4]]
    assert reference.dequantised(codes, scale)[0].tolist() == [7.5, 1.5, -1.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8], ids=["int8", "fp8", "int4"])
def test_zeros_and_broken_rows(dtype):
    x = torch.tensor([[0.0, 0.0], [1.0, math.nan], [-math.inf, 2.0]])
    back = reference.dequantised(*reference.quantised(x, dtype))
    assert back[0].tolist() == [0, 0]
    assert back[1:].isnan().all()


def test_silu_mul():
    gate_up = rand(2, 6)
    expected = [
        [g / (1 + math.exp(-g)) * u for g, u in zip(r[:3], r[3:], strict=True)] for r in gate_up.tolist()
    ]
    close(reference.silu_mul(gate_up), expected)


def test_gelu_mul():
    gate_up = rand(2, 6)
    expected = torch.nn.functional.gelu(gate_up[:, :3], approximate="tanh") * gate_up[:, 3:]
    close(reference.gelu_mul(gate_up), expected.tolist())


def naive_attention(case):
    """One query, one head and one position at a time, over Python floats."""
    out = []
    token = 0
    block_size = case.cache.block_size
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
                    key = case.cache.k[block, kv, j % block_size].tolist()
                    values.append(case.cache.v[block, kv, j % block_size].tolist())
                    logits.append(case.scale * math.fsum(a * b for a, b in zip(query, key, strict=True)))
                    if case.soft_cap is not None:
                        logits[-1] = case.soft_cap * math.tanh(logits[-1] / case.soft_cap)
                weights = [math.exp(logit) for logit in logits]
                total = math.fsum(weights)
                if case.sinks is not None:
                    total += math.exp(case.sinks[head])
                channels = zip(*values, strict=True)
                out[-1].append(
                    [math.fsum(w * x for w, x in zip(weights, c, strict=True)) / total for c in channels]
                )
            token += 1
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("soft_cap", [None, 0.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_paged_attention(attention_case, window, soft_cap, with_sinks):
    case = attention_case(
        (1, 4, 3),
        (9, 6, 3),
        q_per_kv=(2, 1),
        head_dim=3,
        block_size=4,
        dtype=WIDE,
        window=window,
        soft_cap=soft_cap,
        with_sinks=with_sinks,
    )
    close(case.run(reference.paged_attention), naive_attention(case))


@pytest.mark.parametrize("head_dim", [2, 24, 64, 80])
def test_mixing_keeps_products_and_spreads_channels(head_dim):
    q, k = torch.randn(2, 5, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reference.mixed(q) @ reference.mixed(k).T, q @ k.T)
    half = head_dim // 2
    one = torch.zeros(1, head_dim)
    one[0, head_dim - 1] = 1
    spread = 2 * (half & -half)
    assert reference.mixed(one).abs().amax() == pytest.approx(spread**-0.5)
    assert (reference.mixed(one) != 0).sum() == spread

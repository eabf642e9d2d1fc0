"""Norms, rotary, cache writes and the activation of each back end against their definitions."""

import pytest
import torch
from tolerances import assert_within

from kvshard.kernels import reference

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"]
)


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ------------------------------------------------------------------------------------------------ norms


@DTYPES
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (3, 24), (5, 576), (2, 1000)])
def test_rms_norm(backend, tokens, hidden, dtype):
    x, weight = 3 * rand(tokens, hidden, dtype=dtype), rand(hidden, dtype=dtype, seed=1)
    got = backend.ops.rms_norm(x.to(backend.device), weight.to(backend.device), 1e-5)
    assert got.is_contiguous()
    assert_within(got, reference.rms_norm(x, weight, 1e-5), "norm")


@DTYPES
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 24), (5, 576)])
def test_add_rms_norm(backend, tokens, hidden, dtype):
    x, residual = rand(tokens, hidden, dtype=dtype), rand(tokens, hidden, dtype=dtype, seed=2)
    weight = rand(hidden, dtype=dtype, seed=1)
    there = residual.to(backend.device, copy=True)
    got = backend.ops.add_rms_norm(x.to(backend.device), there, weight.to(backend.device), 1e-5)
    reference.add_rms_norm(x, residual, weight, 1e-5)
    assert_within(there, residual, "residual")
    assert_within(got, reference.rms_norm(there.cpu(), weight, 1e-5), "norm")


def test_add_rms_norm_wrong_residual_fails(backend):
    x, residual, weight = rand(3, 64), rand(3, 64, seed=2), rand(64, seed=1)
    there = residual.roll(1, dims=0).to(backend.device)
    got = backend.ops.add_rms_norm(x.to(backend.device), there, weight.to(backend.device), 1e-5)
    with pytest.raises(AssertionError, match="not close"):
        assert_within(got, reference.add_rms_norm(x, residual, weight, 1e-5), "norm")


def test_norm_of_a_view(backend):
    wide, weight = rand(4, 100), rand(48)
    got = backend.ops.rms_norm(wide.to(backend.device)[:, :48], weight.to(backend.device), 1e-5)
    assert got.is_contiguous()
    assert_within(got, reference.rms_norm(wide[:, :48], weight, 1e-5), "norm")


@pytest.mark.parametrize(("weight_factor", "eps"), [(1.001, 1e-5), (1.0, 1e-3)], ids=["weight", "eps"])
def test_rms_norm_wrong_input_fails(backend, weight_factor, eps):
    x, weight = rand(3, 64).to(backend.device), rand(64, seed=1).to(backend.device)
    expected = reference.rms_norm(x.cpu(), weight.cpu(), 1e-5)
    assert_within(backend.ops.rms_norm(x, weight, 1e-5), expected, "norm")
    with pytest.raises(AssertionError, match="not close"):
        assert_within(backend.ops.rms_norm(x, weight * weight_factor, eps), expected, "norm")


def test_cpu_rms_norm_has_the_bits_of_transformers():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from kvshard.kernels import ops

    theirs = LlamaRMSNorm(576, eps=1e-5)
    theirs.weight.data = rand(576, seed=1)
    x = 5 * rand(7, 576)
    with torch.no_grad():
        assert torch.equal(ops.rms_norm(x, theirs.weight.data, 1e-5), theirs(x))


# ------------------------------------------------------------------------------------------------ rotary


def rotary_case(head_dim, rotary_dim, dtype, num_q=3, num_k=2):
    """q and k as views of one qkv tensor, a table of angles, and positions out of order."""
    qkv = rand(5, num_q + 2 * num_k, head_dim, dtype=dtype)
    angles = torch.arange(50).unsqueeze(1) * 100.0 ** -torch.linspace(0, 1, rotary_dim // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    return qkv, cos_sin, torch.tensor([7, 0, 49, 3, 3])


def split_heads(qkv, num_q=3, num_k=2):
    return qkv[:, :num_q], qkv[:, num_q : num_q + num_k]


@DTYPES
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (24, 24), (80, 20), (96, 96)])
def test_rotary(backend, head_dim, rotary_dim, dtype):
    qkv, cos_sin, positions = rotary_case(head_dim, rotary_dim, dtype)
    there = qkv.to(backend.device, copy=True)
    backend.ops.rotary(*split_heads(there), cos_sin.to(backend.device), positions.to(backend.device))
    values = qkv[:, 5:].clone()
    reference.rotary(*split_heads(qkv), cos_sin, positions)
    assert_within(there, qkv, "rotary")
    assert torch.equal(there[:, 5:].cpu(), values)


def test_rotary_wrong_position_fails(backend):
    qkv, cos_sin, positions = rotary_case(64, 64, torch.float32)
    there = qkv.to(backend.device, copy=True)
    reference.rotary(*split_heads(qkv), cos_sin, positions)
    positions[1] += 1
    backend.ops.rotary(*split_heads(there), cos_sin.to(backend.device), positions.to(backend.device))
    assert_within(there[[0, 2, 3, 4]], qkv[[0, 2, 3, 4]], "rotary")
    with pytest.raises(AssertionError, match="not close"):
        assert_within(there, qkv, "rotary")


def test_cpu_rotary_has_the_bits_of_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from kvshard.kernels import ops

    qkv, cos_sin, positions = rotary_case(64, 64, torch.float32)
    q, k = split_heads(qkv.clone())
    cos, sin = (torch.cat([half, half], dim=1)[positions] for half in cos_sin.chunk(2, dim=1))
    theirs = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    ops.rotary(q, k, cos_sin, positions)
    assert torch.equal(q, theirs[0][0].transpose(0, 1))
    assert torch.equal(k, theirs[1][0].transpose(0, 1))


# ------------------------------------------------------------------------------------------------ cache writes


def written(function, device, slots, dtype=torch.float32, head_dim=24, num_kv=2, block_size=16):
    """Both caches after `function` stored 5 tokens in `slots`, stacked; the rest is 7."""
    qkv = rand(5, 1 + 2 * num_kv, head_dim, dtype=dtype).to(device)
    caches = torch.full((2, 4, num_kv, block_size, head_dim), 7.0, dtype=dtype, device=device)
    k, v = qkv[:, 1 : 1 + num_kv], qkv[:, 1 + num_kv :]
    function(k, v, caches[0], caches[1], torch.tensor(slots, device=device))
    return caches.cpu()


@DTYPES
@pytest.mark.parametrize(
    ("slots", "sizes"),
    [
        ([16, 17, 40, 63, 31], {}),
        ([16, -1, 40, 63, -1], {}),
        ([-1, -1, -1, -1, -1], {}),
        ([24, 25, 95, 47, 48], {"block_size": 24, "head_dim": 64, "num_kv": 3}),
    ],
    ids=["all", "some skipped", "all skipped", "block size 24"],
)
def test_kv_write(backend, slots, sizes, dtype):
    got = written(backend.ops.kv_write, backend.device, slots, dtype, **sizes)
    assert torch.equal(got, written(reference.kv_write, "cpu", slots, dtype, **sizes))


def test_kv_write_wrong_slot_fails(backend):
    expected = written(reference.kv_write, "cpu", [16, 17, 40, 63, 31])
    assert not torch.equal(written(backend.ops.kv_write, backend.device, [16, 18, 40, 63, 31]), expected)
    assert not torch.equal(written(backend.ops.kv_write, backend.device, [16, -1, 40, 63, 31]), expected)


# ------------------------------------------------------------------------------------------------ activation


@DTYPES
@pytest.mark.parametrize(("tokens", "inner"), [(1, 1), (3, 24), (2, 1536), (4, 0)])
def test_silu_mul(backend, tokens, inner, dtype):
    gate_up = 4 * rand(tokens, 2 * inner, dtype=dtype)
    got = backend.ops.silu_mul(gate_up.to(backend.device))
    assert got.shape == (tokens, inner)
    assert got.is_contiguous()
    assert_within(got, reference.silu_mul(gate_up), "activation")


def test_silu_mul_wrong_half_fails(backend):
    gate_up = rand(3, 48)
    got = backend.ops.silu_mul(gate_up.roll(24, dims=1).to(backend.device))
    with pytest.raises(AssertionError, match="not close"):
        assert_within(got, reference.silu_mul(gate_up), "activation")

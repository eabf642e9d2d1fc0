"""Norms and gated activations of each back end against their definitions."""

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


# ------------------------------------------------------------------------------------------------ activation


@DTYPES
@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul"])
@pytest.mark.parametrize(("tokens", "inner"), [(1, 1), (3, 24), (2, 1536), (4, 0)])
def test_gated_activation(backend, name, tokens, inner, dtype):
    gate_up = 4 * rand(tokens, 2 * inner, dtype=dtype)
    got = getattr(backend.ops, name)(gate_up.to(backend.device))
    assert got.shape == (tokens, inner)
    assert got.is_contiguous()
    assert_within(got, getattr(reference, name)(gate_up), "activation")


@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul"])
def test_gated_activation_of_a_view_and_of_large_values(backend, name):
    wide = torch.cat([rand(3, 40), torch.full((3, 8), 1e4), torch.full((3, 8), -1e4), rand(3, 4)], dim=1)
    got = getattr(backend.ops, name)(wide.to(backend.device)[:, 24:56])
    assert_within(got, getattr(reference, name)(wide[:, 24:56]), "activation")


@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul"])
def test_gated_activation_wrong_half_fails(backend, name):
    gate_up = rand(3, 48)
    got = getattr(backend.ops, name)(gate_up.roll(24, dims=1).to(backend.device))
    with pytest.raises(AssertionError, match="not close"):
        assert_within(got, getattr(reference, name)(gate_up), "activation")

"""Gate and up with their activation in one call, against the product and the activation one after the other."""

import pytest
import torch
from torch import Tensor

from kvshard.kernels import reference
from kvshard.kernels.linear_ops import LinearWeight, gated_linear, linear
from kvshard.kernels.weight_codes import WeightCodes

from ..tolerances import assert_within

ACTIVATIONS = {"silu": reference.silu_mul, "gelu_tanh": reference.gelu_mul}
WIDTH = 96


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) / 4


def codes(num_rows: int) -> WeightCodes:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(-127, 128, (num_rows, WIDTH), generator=generator, dtype=torch.int8)
    scales = torch.rand(num_rows, WIDTH // 32, generator=generator).half() / 200
    return WeightCodes(values, scales, None, torch.bfloat16)


def expected(x: Tensor, weight: Tensor | WeightCodes, activation: str) -> Tensor:
    copy = weight.rows(torch.arange(weight.shape[0])) if isinstance(weight, WeightCodes) else weight.clone()
    return ACTIVATIONS[activation](linear(x, LinearWeight.take(copy)))


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("inner", [0, 16, 24, 80])
@pytest.mark.parametrize("kind", ["bfloat16", "float32", "codes"])
def test_matches_one_after_the_other(kind: str, inner: int, activation: str) -> None:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    weight = codes(2 * inner) if kind == "codes" else numbers(2 * inner, WIDTH, seed=1, dtype=dtype)
    for tokens in (1, 16, 17, 33, 70, 500):
        x = numbers(tokens, WIDTH, seed=2, dtype=dtype)
        copy = weight.rows(torch.arange(2 * inner)) if isinstance(weight, WeightCodes) else weight.clone()
        got = gated_linear(x, LinearWeight.take_gated(copy), activation)
        assert got.shape == (tokens, inner)
        assert_within(got, expected(x, weight, activation), "activation")


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("row", [0, 15, 16, 79, 80, 159])
def test_each_row_counts(row: int) -> None:
    """Another number in a row of gate or of up is felt."""
    weight, x = numbers(160, WIDTH, seed=1), numbers(20, WIDTH, seed=2)
    wrong = weight.clone()
    wrong[row, 50] += 4
    with pytest.raises(AssertionError, match="not close"):
        assert_within(
            gated_linear(x, LinearWeight.take_gated(wrong), "silu"), expected(x, weight, "silu"), "activation"
        )


@pytest.mark.usefixtures("processor")
def test_a_token_has_the_same_bits_in_any_batch() -> None:
    weight = LinearWeight.take_gated(numbers(160, 1184, seed=1))
    tokens = 70 if weight.packed else 64  # of more, torch multiplies a plain weight
    x = numbers(tokens, 1184, seed=2)
    whole = gated_linear(x, weight, "silu")
    for begin, end in ((0, 1), (16, 17), (5, 38), (40, tokens)):
        assert torch.equal(gated_linear(x[begin:end], weight, "silu"), whole[begin:end])

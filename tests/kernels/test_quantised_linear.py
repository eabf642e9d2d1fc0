"""The Triton product with a weight kept as codes, against its definition; interpreted where there is no GPU."""

import pytest
import torch
from torch import Tensor

from kvshard.kernels import reference
from kvshard.kernels.linear_ops import LinearWeight, embedding, linear
from kvshard.kernels.weight_codes import WeightCodes

from ..tolerances import assert_within

pytest.importorskip("triton")

from kvshard.kernels.triton.linear import quantised_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = ("int8", "int4", "int4 with minima")


def codes_of(format: str, rows: int, width: int, dtype: torch.dtype) -> WeightCodes:
    """Numbers up to about 4. Scales are powers of two, so that every number but those with minima is exact in any dtype:
    Triton's interpreter does not round to bfloat16, it cuts.
    """
    random = torch.Generator().manual_seed(1)
    groups = width // 32
    powers = torch.randint(-2, 1, (rows, groups), generator=random)
    if format == "int8":
        codes = torch.randint(-128, 128, (rows, width), generator=random, dtype=torch.int8)
        return WeightCodes(codes, (2.0 ** (powers - 5)).half(), None, dtype)
    codes = torch.randint(0, 256, (rows, width // 2), generator=random, dtype=torch.uint8)
    scales = (2.0 ** (powers - 1)).half()
    minima = (scales * torch.randint(-9, 1, (rows, groups), generator=random)).half()
    return WeightCodes(codes, scales, minima if "minima" in format else None, dtype)


def on_device(weight: WeightCodes) -> WeightCodes:
    minima = None if weight.minima is None else weight.minima.to(DEVICE)
    return WeightCodes(weight.codes.to(DEVICE), weight.scales.to(DEVICE), minima, weight.dtype)


def product(x: Tensor, weight: WeightCodes, bias: Tensor | None = None) -> Tensor:
    moved = None if bias is None else bias.to(DEVICE)
    return quantised_linear(x.to(DEVICE), on_device(weight), moved, x.dtype).cpu()


def expected(x: Tensor, weight: WeightCodes, bias: Tensor | None = None) -> Tensor:
    return reference.quantised_linear(x, weight.codes, weight.scales, weight.minima, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_products(format: str, dtype: torch.dtype) -> None:
    """Rows, tokens and groups that fill no tile, or several; x with gaps between its rows."""
    random = torch.Generator().manual_seed(2)
    for tokens, rows, width in ((1, 5, 32), (3, 83, 96), (70, 33, 160)):
        weight, bias = codes_of(format, rows, width, dtype), torch.randn(rows, generator=random).to(dtype)
        x = torch.randn(tokens, width + 7, generator=random).to(dtype)[:, 3 : 3 + width]
        assert_within(product(x, weight), expected(x, weight), "product")
        assert_within(product(x, weight, bias), expected(x, weight, bias), "product")


def test_float32_results() -> None:
    x, weight = torch.randn(3, 96).bfloat16(), codes_of("int4", 33, 96, torch.bfloat16)
    got = quantised_linear(x.to(DEVICE), on_device(weight), None, torch.float32)
    assert got.dtype == torch.float32
    assert_within(got, x.float() @ weight.widen().float().T, "product")


@pytest.mark.parametrize("format", FORMATS)
def test_any_wrong_number_is_seen(format: str) -> None:
    """One code, scale or minimum changed, at the ends of a row and of the matrix."""
    x, weight = torch.randn(2, 96), codes_of(format, 35, 96, torch.float32)
    good = expected(x, weight)
    for row in (0, 31, 34):
        for name in ("codes", "scales", *(("minima",) if weight.minima is not None else ())):
            for column in (0, -1):
                wrong = weight.rows(torch.arange(35))
                getattr(wrong, name)[row, column] += 1 if name != "codes" else 64
                with pytest.raises(AssertionError, match="not close"):
                    assert_within(product(x, wrong), good, "product")


@pytest.mark.skipif(DEVICE == "cpu", reason="the door sends tensors on CUDA to Triton")
def test_the_door() -> None:
    weight = codes_of("int4 with minima", 83, 96, torch.float16)
    x, moved = torch.randn(5, 96).half(), LinearWeight.take(on_device(weight))
    assert_within(linear(x.to(DEVICE), moved), expected(x, weight), "product")
    ids = torch.tensor([3, 82], device=DEVICE)
    assert torch.equal(embedding(ids, moved).cpu(), weight.widen()[[3, 82]])

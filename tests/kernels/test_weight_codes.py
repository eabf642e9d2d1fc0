"""Products with weights kept as codes: the same bits as with the weight that was widened before, in every way there is."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvshard.kernels.cpu.linear import can_pack
from kvshard.kernels.linear_ops import LinearWeight, embedding, linear
from kvshard.kernels.weight_codes import WeightCodes

from ..tolerances import assert_within

# Tiles are of 16 and 32 tokens, blocks of vectors of rows of 48, ten of them at a time; more than 64 tokens go through torch
# where nothing is packed.
TOKENS = (1, 2, 3, 32, 33, 50, 481)
SHAPES = ((83, 96), (32, 576), (5, 32), (130, 64), (130, 1184))
FORMATS = ("Q8_0", "Q4_0", "Q4_1")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def codes_of(format: str, rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> WeightCodes:
    """All codes that there are, scales of both signs, and groups of zeros."""
    random = torch.Generator().manual_seed(seed)
    groups = width // 32
    scales = torch.randn(rows, groups, generator=random).half() / 16
    scales[::3, -1:] = 0
    if format == "Q8_0":
        codes = torch.randint(-128, 128, (rows, width), generator=random, dtype=torch.int8)
    else:
        codes = torch.randint(0, 256, (rows, width // 2), generator=random, dtype=torch.uint8)
    minima = torch.randn(rows, groups, generator=random).half() if format == "Q4_1" else None
    return WeightCodes(codes, scales, minima, dtype)


def copy_of(codes: WeightCodes) -> WeightCodes:
    return codes.rows(torch.arange(codes.shape[0]))


def number(codes: WeightCodes, row: int, channel: int) -> float:
    """By the formula of the module, one number at a time."""
    group, place = divmod(channel, 32)
    if codes.bits == 8:
        code = int(codes.codes[row, channel])
    else:
        byte = int(codes.codes[row, group * 16 + place % 16])
        code = byte % 16 if place < 16 else byte // 16
        code -= 8 if codes.minima is None else 0
    product = code * float(codes.scales[row, group])
    return product if codes.minima is None else product + float(codes.minima[row, group])


@pytest.mark.parametrize("format", FORMATS)
def test_numbers(format: str) -> None:
    codes = codes_of(format, 3, 64, torch.float32)
    expected = torch.tensor([[number(codes, row, c) for c in range(64)] for row in range(3)])
    assert torch.equal(codes.widen(), expected)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("way", ["here", "vectors", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_bits_are_those_of_the_widened_weight(
    format: str, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """here: packed where this processor packs; vectors: as where none does; torch: as without a compiler."""
    if way == "torch":
        monkeypatch.setattr("kvshard.kernels.cpu.linear._library", lambda: None)
    take: Callable[..., LinearWeight] = LinearWeight if way == "vectors" else LinearWeight.take
    for rows, width in SHAPES:
        codes = codes_of(format, rows, width, dtype)
        wide = take(codes.widen())
        weight = take(copy_of(codes))
        assert weight.packed == wide.packed
        unrounded = weight.packed and can_pack(torch.empty(1, 32))  # vectors of rows take codes in float32
        wide_dtype = torch.float32 if unrounded else dtype
        reference = take(replace(codes, dtype=wide_dtype).widen())
        bias = torch.randn(rows).to(dtype)
        for tokens in TOKENS:
            x = torch.randn(tokens, width).to(dtype)
            for result in (dtype, torch.float32):
                expected = linear(x.to(wide_dtype), reference, bias.to(wide_dtype), dtype=torch.float32).to(
                    result
                )
                assert torch.equal(linear(x, weight, bias, dtype=result), expected), (rows, width, tokens)
            assert torch.equal(linear(x, weight), linear(x.to(wide_dtype), reference).to(dtype))
        ids = torch.tensor([[0, rows - 1], [rows // 2, 1]])
        assert torch.equal(embedding(ids, weight, scale=1.5), embedding(ids, wide, scale=1.5))
        assert torch.equal(embedding(ids, weight, rows // 2), embedding(ids, wide, rows // 2))


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("num_threads", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_number_of_threads(dtype: torch.dtype, num_threads: int) -> None:
    weight = LinearWeight.take(codes_of("Q4_1", 201, 96, dtype))
    x = torch.randn(40, 96).to(dtype)
    alone = linear(x, weight)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(linear(x, weight), alone)
    finally:
        torch.set_num_threads(before)


def flipped(tensor: Tensor, place: tuple[int, int], bit: int) -> Tensor:
    changed = tensor.clone()
    changed.view(torch.uint8 if tensor.element_size() == 1 else torch.int16)[place] ^= 1 << bit
    return changed


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [2, 3])
def test_any_wrong_bit_is_seen(format: str, dtype: torch.dtype, tokens: int) -> None:
    """In the one row it belongs to, and nowhere else: in a whole chunk of 32 rows and in what is left."""
    codes = codes_of(format, 83, 96, dtype)
    codes.scales.fill_(0.5)
    if codes.minima is not None:
        codes.minima.fill_(1)
    x = torch.randn(tokens, 96).to(dtype)
    expected = linear(x, LinearWeight.take(copy_of(codes)), dtype=torch.float32)
    for row in (0, 31, 40, 82):
        wrong = [WeightCodes(flipped(codes.codes, (row, 40), 5), codes.scales, codes.minima, dtype)]
        wrong.append(WeightCodes(codes.codes, flipped(codes.scales, (row, 2), 10), codes.minima, dtype))
        if codes.minima is not None:
            wrong.append(WeightCodes(codes.codes, codes.scales, flipped(codes.minima, (row, 1), 10), dtype))
        for changed in wrong:
            differs = linear(x, LinearWeight.take(copy_of(changed)), dtype=torch.float32) != expected
            assert differs[:, row].all()
            assert not differs[:, torch.arange(83) != row].any()


def test_large_matrices_are_widened_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = codes_of("Q8_0", 83, 96, torch.float32)
    x, bias = torch.randn(70, 96), torch.randn(83)
    whole = linear(x, LinearWeight(codes), bias)
    monkeypatch.setattr("kvshard.kernels.cpu.linear._PIECE_BYTES", 96 * 4 * 10)
    assert_within(linear(x, LinearWeight(codes), bias), whole, "product")


def test_empty_ones() -> None:
    for rows, width in ((0, 32), (8, 0)):
        weight = LinearWeight.take(codes_of("Q4_1", rows, width, torch.bfloat16))
        for tokens in (1, 70):
            y = linear(torch.ones(tokens, width, dtype=torch.bfloat16), weight)
            assert y.shape == (tokens, rows)
            assert y.eq(0).all()


def test_refusals() -> None:
    codes, scales = torch.zeros(4, 64, dtype=torch.int8), torch.zeros(4, 2, dtype=torch.float16)
    halves = torch.zeros(4, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"codes: expected int8 \[4, 64\] or uint8 \[4, 32\]"):
        WeightCodes(codes[:, :32], scales, None, torch.float32)
    with pytest.raises(ValueError, match=r"scales: expected float16 \[4, 2\]"):
        WeightCodes(codes, scales.float(), None, torch.float32)
    with pytest.raises(ValueError, match="minima: codes of 8 bits have none"):
        WeightCodes(codes, scales, scales, torch.float32)
    with pytest.raises(ValueError, match=r"minima: expected float16 \[4, 2\]"):
        WeightCodes(halves, scales, scales[:, :1], torch.float32)
    with pytest.raises(ValueError, match="codes: expected to be contiguous"):
        WeightCodes(torch.zeros(64, 4, dtype=torch.int8).T, scales, None, torch.float32)
    with pytest.raises(ValueError, match="dtype: expected float32"):
        WeightCodes(codes, scales, None, torch.float64)
    weight = LinearWeight(WeightCodes(codes, scales, None, torch.float32))
    with pytest.raises(ValueError, match=r"x: expected shape \[T, 64\] torch.float32"):
        linear(torch.zeros(2, 64, dtype=torch.bfloat16), weight)

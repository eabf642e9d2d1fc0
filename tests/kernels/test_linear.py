"""Products with weights, plain and packed, against float64; the same bits in any company."""

import pytest
import torch
from torch import Tensor

from kvshard.kernels.linear_ops import LinearWeight, embedding, linear
from kvshard.kernels.weight_codes import WeightCodes

from ..tolerances import assert_within

TOKENS = (1, 5, 14, 15, 16, 17, 32, 33, 70)  # tiles are of 16 and 32, vectors meet up to 12
ROWS = (7, 32, 83, 960)
WIDTHS = (32, 96, 100, 576)
IN_C = 64  # tokens up to which a plain weight is read in C


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return x.double() @ w.double().T + bias.double()


def assert_differs(got: Tensor, expected: Tensor) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_within(got, expected, "product")


def is_packed(dtype: torch.dtype = torch.bfloat16) -> bool:
    return LinearWeight.take(torch.zeros(32, 32, dtype=dtype)).packed


needs_packing = pytest.mark.skipif(not is_packed(), reason="this processor packs nothing")


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize(
    ("taken", "dtype"),
    [
        (True, torch.bfloat16),
        (True, torch.float32),
        (False, torch.bfloat16),
        (False, torch.float32),
        (False, torch.float16),
    ],
    ids=["taken", "taken float32", "plain", "float32", "float16"],
)
def test_products(taken: bool, dtype: torch.dtype, num_rows: int, width: int) -> None:
    w, bias = numbers(num_rows, width, seed=1, dtype=dtype), numbers(num_rows, seed=2, dtype=dtype)
    weight = LinearWeight.take(w.clone()) if taken else LinearWeight(w)
    for tokens in TOKENS:
        x = numbers(tokens, width, seed=3, dtype=dtype)
        expected = exact(x, w, bias)
        assert_within(linear(x, weight, bias), expected.to(dtype), "product")
        assert_within(linear(x, weight), exact(x, w, torch.zeros(num_rows)).to(dtype), "product")
        if weight.packed or tokens <= IN_C:  # torch rounds to the dtype first
            assert_within(linear(x, weight, bias, dtype=torch.float32), expected.float(), "product")


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_wrong_number_is_seen(dtype: torch.dtype) -> None:
    """One number of the weight, the bias or the input changed, at a border of tiles or in the last, partly filled one."""
    w, bias = numbers(83, 96, seed=1, dtype=dtype), numbers(83, seed=2, dtype=dtype)
    x = numbers(33, 96, seed=3, dtype=dtype)
    expected = exact(x, w, bias).to(dtype)
    for row, column in ((0, 0), (31, 31), (32, 32), (64, 95), (82, 95)):
        wrong = w.clone()
        wrong[row, column] += 1
        assert_differs(linear(x, LinearWeight.take(wrong), bias), expected)
    for row in (15, 16, 63, 82):
        wrong = bias.clone()
        wrong[row] += 1
        assert_differs(linear(x, LinearWeight.take(w.clone()), wrong), expected)
    for token, column in ((15, 0), (16, 31), (32, 95)):
        wrong = x.clone()
        wrong[token, column] += 1
        assert_differs(linear(wrong, LinearWeight.take(w.clone()), bias), expected)


@pytest.mark.parametrize(
    ("packed", "dtype"),
    [
        (True, torch.bfloat16),
        (True, torch.float32),
        (False, torch.bfloat16),
        (False, torch.float32),
        (False, torch.float16),
    ],
    ids=["packed", "packed float32", "bfloat16", "float32", "float16"],
)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("width", [576, 1952, 4128], ids=["one panel", "four panels", "eight panels"])
@pytest.mark.usefixtures("processor")
def test_a_token_has_the_same_bits_in_any_batch(
    width: int, num_threads: int, packed: bool, dtype: torch.dtype
) -> None:
    if packed and not is_packed(dtype):
        pytest.skip("this processor packs none of these")
    tokens = 500 if packed else IN_C  # threads turn blocks of them side by side
    w, x = numbers(83, width, seed=1, dtype=dtype), numbers(tokens, width, seed=3, dtype=dtype) / 4
    weight = LinearWeight.take(w.clone()) if packed else LinearWeight(w)
    whole = linear(x, weight, dtype=torch.float32)
    assert_within(whole, exact(x, w, torch.zeros(83)).float(), "product")
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for begin, end in ((0, 1), (16, 17), (5, 38), (40, tokens), (0, tokens)):
            assert torch.equal(linear(x[begin:end], weight, dtype=torch.float32), whole[begin:end])
    finally:
        torch.set_num_threads(before)


@needs_packing
def test_broken_tokens_harm_no_others() -> None:
    weight, x = LinearWeight.take(numbers(83, 96, seed=1)), numbers(33, 96, seed=3)
    whole = linear(x, weight)
    x[20, 5] = float("nan")
    got = linear(x, weight)
    assert got[20].isnan().all()
    others = torch.arange(33) != 20
    assert torch.equal(got[others], whole[others])


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_any_stride(dtype: torch.dtype) -> None:
    wide = numbers(1000, 200, seed=3, dtype=dtype)  # more than are multiplied at a time
    w, bias = numbers(83, 96, seed=1, dtype=dtype), numbers(83, seed=2, dtype=dtype)
    x = wide[:, 50:146]
    got = linear(x, LinearWeight.take(w.clone()), bias)
    assert_within(got, exact(x, w, bias).to(dtype), "product")


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("coded", [False, True], ids=["numbers", "codes"])
def test_more_rows_than_are_kept(coded: bool, dtype: torch.dtype) -> None:
    """A matrix that is met in several parts, each in several panels."""
    if not is_packed(dtype):
        pytest.skip("this processor packs none of these")
    w, x = numbers(700, 1952, seed=1, dtype=dtype), numbers(70, 1952, seed=3, dtype=dtype) / 4
    kept: Tensor | WeightCodes = w.clone()
    if coded:
        scales = torch.full((700, 61), 0.03125, dtype=torch.float16)
        kept = WeightCodes((w * 32).clamp(-127, 127).to(torch.int8), scales, None, dtype)
        w = kept.widen()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        weight = LinearWeight.take(kept)
        whole = linear(x, weight, dtype=torch.float32)
        assert_within(whole, exact(x, w, torch.zeros(700)).float(), "product")
        assert torch.equal(linear(x[50:51], weight, dtype=torch.float32), whole[50:51])
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", ROWS)
def test_embedding(num_rows: int, dtype: torch.dtype) -> None:
    w = numbers(num_rows, 96, dtype=dtype)
    weight = LinearWeight.take(w.clone())
    for ids in (
        torch.arange(num_rows),
        torch.tensor([[num_rows - 1, 0]], dtype=torch.int32),
        torch.empty(0).long(),
    ):
        assert torch.equal(embedding(ids, weight), w[ids.long()])
        assert torch.equal(embedding(ids, weight, scale=1.5), w[ids.long()] * 1.5)
    ids = torch.tensor([9, 10, 10 + num_rows - 1, 10 + num_rows])  # of rows 10 to 10 + num_rows - 1
    none = torch.zeros(1, 96, dtype=dtype)
    assert torch.equal(embedding(ids, weight, 10), torch.cat((none, w[[0, -1]], none)))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvshard.kernels.cpu.linear._library", lambda: None)
    w, bias, x = numbers(83, 96, seed=1), numbers(83, seed=2), numbers(33, 96, seed=3)
    weight = LinearWeight.take(w)
    assert not weight.packed
    assert_within(linear(x, weight, bias), exact(x, w, bias).bfloat16(), "product")
    none = torch.zeros(1, 96).bfloat16()
    assert torch.equal(embedding(torch.tensor([9, 12]), weight, 10, 2.0), torch.cat((none, w[2:3] * 2)))


def test_what_is_not_packed() -> None:
    """Other dtypes, widths that tiles do not divide, empty ones, and views."""
    for w in (numbers(32, 32).half(), numbers(32, 40), numbers(32, 0), numbers(32, 64)[:, :32]):
        kept = w.clone()
        weight = LinearWeight.take(w)
        assert not weight.packed
        assert torch.equal(weight.values, kept)
    assert linear(numbers(3, 0), LinearWeight(numbers(8, 0))).eq(0).all()


def test_refusals() -> None:
    weight, x = LinearWeight(numbers(8, 32)), numbers(3, 32)
    with pytest.raises(ValueError, match=r"x: expected shape \[T, 32\]"):
        linear(numbers(3, 16), weight)
    with pytest.raises(ValueError, match="x: expected"):
        linear(x.float(), weight)
    with pytest.raises(ValueError, match="adjacent"):
        linear(numbers(32, 3).T, weight)
    with pytest.raises(ValueError, match=r"bias: expected shape \[8\]"):
        linear(x, weight, numbers(7))
    with pytest.raises(
        ValueError, match=r"dtype: expected torch.bfloat16 or torch.float32, got torch.float16"
    ):
        linear(x, weight, dtype=torch.float16)

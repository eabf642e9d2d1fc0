"""Philox4x32-10, the Gumbel noise made of it, and the radix select."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from kvshard.kernels import philox
from kvshard.kernels.philox import gumbel_noise, philox_4x32
from kvshard.parallel.group import Group
from kvshard.runtime.shard.radix_select import cut_at_weight, ordered_keys, values_of_keys

ALL_ONES = 0xFFFFFFFF
# "kat_vectors" of Random123, the authors' own library: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEED = 0xFEDCBA9876543210
POSITION = 1234


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def signed(seed: int) -> int:
    return seed - (1 << 64) if seed >> 63 else seed


def noise(seed: int, position: int, tokens: range, sample_index: int = 0) -> Tensor:
    seeds, positions = torch.tensor([signed(seed)]), torch.tensor([position])
    return gumbel_noise(seeds, positions, tokens, sample_index=sample_index)[0]


def philox_in_integers(counter: list[int], key: list[int]) -> list[int]:
    """One counter in Python integers, written from the paper."""
    for _ in range(10):
        left, right = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            right >> 32 ^ counter[1] ^ key[0],
            right & ALL_ONES,
            left >> 32 ^ counter[3] ^ key[1],
            left & ALL_ONES,
        ]
        key = [(key[0] + 0x9E3779B9) & ALL_ONES, (key[1] + 0xBB67AE85) & ALL_ONES]
    return counter


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    words = philox_4x32(
        tuple(torch.tensor([word]) for word in counter),  # type: ignore[arg-type]
        tuple(torch.tensor([word]) for word in key),  # type: ignore[arg-type]
    )
    assert tuple(int(word) for word in words) == expected
    assert tuple(philox_in_integers(list(counter), list(key))) == expected


def test_counters_and_keys_broadcast() -> None:
    zero = torch.zeros((), dtype=torch.int64)
    blocks, keys = torch.arange(5), torch.tensor([[3], [ALL_ONES]])
    words = philox_4x32((blocks, zero, zero, zero), (keys, zero))
    for row, key in enumerate((3, ALL_ONES)):
        for block in range(5):
            expected = philox_in_integers([block, 0, 0, 0], [key, 0])
            assert [int(word[row, block]) for word in words] == expected


def test_noise_of_each_token_follows_the_definition() -> None:
    tokens = range(49150, 49159)
    got = noise(SEED, POSITION, tokens, sample_index=3)
    for value, token in zip(got.tolist(), tokens, strict=True):
        words = philox_in_integers([token // 4, POSITION, 3, 0], [SEED & ALL_ONES, SEED >> 32])
        uniform = ((words[token % 4] >> 9) + 0.5) * 2**-23
        assert value == pytest.approx(-math.log(-math.log(uniform)), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 4093])
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_noise_does_not_depend_on_the_range_asked_for(start: int, count: int) -> None:
    whole = noise(SEED, POSITION, range(6000))
    assert torch.equal(noise(SEED, POSITION, range(start, start + count)), whole[start : start + count])


@pytest.mark.parametrize(
    ("seed", "position", "sample_index"),
    [
        (SEED ^ 1, POSITION, 0),
        (SEED ^ 1 << 32, POSITION, 0),
        (SEED ^ 1 << 63, POSITION, 0),
        (SEED, POSITION + 1, 0),
        (SEED, POSITION, 1),
    ],
)
def test_each_part_of_the_name_changes_all_noise(seed: int, position: int, sample_index: int) -> None:
    tokens = range(1000)
    assert (
        noise(seed, position, tokens, sample_index) != noise(SEED, POSITION, tokens)
    ).float().mean() > 0.99


@pytest.mark.parametrize(("word", "uniform"), [(0, 2**-24), (ALL_ONES, 1 - 2**-24)])
def test_noise_is_finite_at_both_ends(monkeypatch: pytest.MonkeyPatch, word: int, uniform: float) -> None:
    expected = -math.log(-math.log(uniform))  # -2.81 and 16.64
    words = tuple(torch.full((1, 2), word) for _ in range(4))
    monkeypatch.setattr(philox, "philox_4x32", lambda counter, key: words)
    assert torch.allclose(noise(SEED, POSITION, range(8)), torch.full((8,), expected), rtol=1e-6)


def test_noise_has_the_gumbel_distribution() -> None:
    """Kolmogorov-Smirnov: sqrt(n) times the largest distance to exp(-exp(-x)) is above 2.76 for one seed in 2 million."""
    values = np.sort(noise(SEED, POSITION, range(200_000)).double().numpy())
    steps = np.arange(len(values) + 1) / len(values)

    def statistic(shift: float) -> float:
        exact = np.exp(-np.exp(-(values + shift)))
        return math.sqrt(len(values)) * max(np.max(steps[1:] - exact), np.max(exact - steps[:-1]))

    assert statistic(0.0) < 2.76
    assert statistic(0.03) > 2.76, "the test would not see noise that is off by 0.03"


SPECIAL = [-math.inf, -3.4e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 3.4e38, math.inf]


def test_keys_keep_the_order_and_turn_back() -> None:
    values = torch.tensor(SPECIAL)
    keys = ordered_keys(values)
    assert (keys.diff() > 0).all()
    assert torch.equal(values_of_keys(keys).view(torch.int32), values.view(torch.int32))


def brute_force_cut(values: Tensor, weights: Tensor, target: int) -> float:
    candidates = sorted(set(values.tolist()), reverse=True)
    return next(cut for cut in candidates if int(weights[values >= cut].sum()) >= target)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_cut_at_weight_against_trying_all_values(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    group = Group.single("cpu")
    scale = torch.tensor([[1e-42], [1e-3], [1.0], [30.0], [1e38]])
    values = torch.randn(5, 60, generator=generator) * scale
    values[:, :11] = torch.tensor(SPECIAL)
    values[:, 20:40] = values[:, 40:]  # ties
    most = 9 if dtype == torch.int32 else 1 << 40
    weights = torch.randint(0, most, values.shape, generator=generator, dtype=dtype)
    totals = weights.long().sum(1)
    for share in (0.0, 0.01, 0.3, 0.5, 0.9, 1.0):
        targets = (totals.double() * share).long().clamp(min=1)
        cuts = cut_at_weight(group, values, weights, targets, "test")
        for row, target in enumerate(targets.tolist()):
            assert cuts[row].item() == brute_force_cut(values[row], weights[row], target)


def test_cut_at_weight_finds_every_rank_of_all_keys() -> None:
    """Keys at both ends of the int32 range, where differences of keys wrap around."""
    values = torch.tensor([SPECIAL])
    weights = torch.ones_like(values, dtype=torch.int32)
    for k in range(1, len(SPECIAL) + 1):
        cut = cut_at_weight(Group.single("cpu"), values, weights, torch.tensor([k]), "test")
        assert cut.view(torch.int32).item() == values[0, -k].view(torch.int32).item()

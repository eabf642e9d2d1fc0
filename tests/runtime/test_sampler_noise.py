"""The definition of the noise (Philox4x32-10 and the Gumbel distribution), and the radix select."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from kvshard.kernels import sampling_ops
from kvshard.kernels.sampling_reference import gumbel, gumbel_noise, masses, philox_4x32
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


def noise(seed: int, place: int, tokens: range) -> Tensor:
    return gumbel_noise(torch.tensor([signed(seed)]), torch.tensor([place]), tokens.start, len(tokens))[0]


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
        tuple(torch.tensor([word]) for word in counter),
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


@pytest.mark.parametrize("sample_index", [0, 1, 2**31 - 1])
def test_noise_of_each_token_follows_the_definition(sample_index: int) -> None:
    tokens = range(49150, 49159)
    got = noise(SEED, POSITION + (sample_index << 32), tokens)
    for value, token in zip(got.tolist(), tokens, strict=True):
        words = philox_in_integers([token // 4, POSITION, sample_index, 0], [SEED & ALL_ONES, SEED >> 32])
        uniform = ((words[token % 4] >> 9) + 0.5) * 2**-23
        assert value == pytest.approx(-math.log(-math.log(uniform)), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 4093])
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_noise_does_not_depend_on_the_range_asked_for(start: int, count: int) -> None:
    whole = noise(SEED, POSITION, range(6000))
    assert torch.equal(noise(SEED, POSITION, range(start, start + count)), whole[start : start + count])


@pytest.mark.parametrize(
    ("seed", "place"),
    [
        (SEED ^ 1, POSITION),
        (SEED ^ 1 << 32, POSITION),
        (SEED ^ 1 << 63, POSITION),
        (SEED, POSITION + 1),
        (SEED, POSITION + (1 << 32)),
    ],
)
def test_each_part_of_the_name_changes_all_noise(seed: int, place: int) -> None:
    tokens = range(1000)
    assert (noise(seed, place, tokens) != noise(SEED, POSITION, tokens)).float().mean() > 0.99


@pytest.mark.parametrize(("bits", "uniform"), [(0, 2**-24), (2**23 - 1, 1 - 2**-24)])
def test_noise_is_finite_at_both_ends(bits: int, uniform: float) -> None:
    expected = -math.log(-math.log(uniform))  # -2.81 and 16.64
    assert gumbel(torch.tensor([bits])).item() == pytest.approx(expected, rel=1e-6)


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


def count_cut(values: Tensor, targets: Tensor, is_limited: Tensor | None = None) -> Tensor:
    return cut_at_weight(
        Group.single("cpu"),
        lambda prefix, shift: sampling_ops.count_histogram(values, prefix, shift),
        torch.ones(len(values), dtype=torch.bool) if is_limited is None else is_limited,
        lambda total: targets,
        "test",
    )


def spread_values() -> Tensor:
    """[5, 60] of all magnitudes, with ties."""
    scale = torch.tensor([[1e-42], [1e-3], [1.0], [30.0], [1e38]])
    values = torch.randn(5, 60, generator=torch.Generator().manual_seed(3)) * scale
    values[:, :11] = torch.tensor(SPECIAL)
    values[:, 20:40] = values[:, 40:]
    return values


SHARES = (0.0, 0.01, 0.3, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("share", SHARES)
def test_cut_at_a_count_against_trying_all_values(share: float) -> None:
    values = spread_values()
    targets = torch.full((5,), max(int(60 * share), 1))
    cuts = count_cut(values, targets)
    for row, target in enumerate(targets.tolist()):
        assert cuts[row].item() == brute_force_cut(values[row], torch.ones(60, dtype=torch.int64), target)


@pytest.mark.parametrize("share", SHARES)
def test_cut_at_a_mass_against_trying_all_values(share: float) -> None:
    """Of the entries at or above another cut; the share is worked out from their total."""
    values = spread_values()[:, 1:10]  # without the infinities
    max_logits = values.amax(1)
    kept, ones = values.sort().values[:, 2].contiguous(), torch.ones(5)
    weights = torch.where(values >= kept[:, None], masses(values, max_logits), 0)
    cuts = cut_at_weight(
        Group.single("cpu"),
        lambda prefix, shift: sampling_ops.mass_histogram(values, ones, kept, max_logits, prefix, shift),
        torch.ones(5, dtype=torch.bool),
        lambda total: (total * share).long().clamp(min=1),
        "test",
    )
    for row in range(5):
        target = max(int(weights[row].sum().item() * share), 1)
        assert cuts[row].item() == brute_force_cut(values[row], weights[row], target)


def test_cut_at_weight_finds_every_rank_of_all_keys() -> None:
    """Keys at both ends of their range."""
    values = torch.tensor([SPECIAL])
    for k in range(1, len(SPECIAL) + 1):
        cut = count_cut(values, torch.tensor([k]))
        assert cut.view(torch.int32).item() == values[0, -k].view(torch.int32).item()


def test_rows_without_a_limit_are_not_cut() -> None:
    is_limited = torch.tensor([True, False, True, False, False])
    cuts = count_cut(spread_values(), torch.full((5,), 7), is_limited)
    assert torch.equal(cuts > -math.inf, is_limited)

"""What the sampler chooses: against a sort-based reference in vLLM's order."""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from frequencies import chi_square, chi_square_limit
from torch import Tensor

from kvshard.kernels.sampling_reference import gumbel_noise
from kvshard.parallel.group import Group
from kvshard.runtime.coordinator.plan import NO_TOKEN, Int32, SlotSampling
from kvshard.runtime.shard.sampler import Sampler

CPU = torch.device("cpu")
SEED = 0xFEDCBA9876543210
GREEDY = {"temperature": 0.0}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(**changes: Any) -> SlotSampling:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": SEED, "logprobs": None}
    return SlotSampling(**{**values, "stop_ids": (), "stop_from": 0, **changes})


class RecordingSampler(Sampler):
    """Keeps which tokens were not cut away, [R, V] bool."""

    def _cut(self, logits: Tensor, slots: Int32, temperature: Tensor, *limits: Tensor) -> Tensor:
        cut = super()._cut(logits, slots, temperature, *limits)
        self.kept = ~(logits / temperature[:, None] < cut[:, None])
        return cut


def sampler_of(vocab_size: int, *slots: SlotSampling) -> RecordingSampler:
    sampler = RecordingSampler(Group.single(CPU), range(vocab_size), vocab_size, max(len(slots), 1), CPU)
    for slot, sampling in enumerate(slots):
        sampler.open(slot, sampling)
    return sampler


def run(sampler: Sampler, logits: Tensor, positions: list[int] | None = None) -> tuple[Tensor, Tensor | None]:
    """The tokens and their log probabilities. Row r is slot r, at position r if none are given."""
    slots = np.arange(len(logits), dtype=np.int32)
    places = slots.astype(np.int64) if positions is None else np.array(positions, np.int64)
    token_ids, table = sampler.sample(logits, slots, places)
    return token_ids, None if table is None else table.logprobs[:, 0]


def draw(logits: list[float] | Tensor, sampling: SlotSampling, count: int) -> npt.NDArray[np.int64]:
    """Tokens for the same logits at positions 0..count-1."""
    row = torch.as_tensor(logits, dtype=torch.float32)
    sampler = sampler_of(len(row), sampling)
    tokens = []
    for start in range(0, count, 1000):
        positions = np.arange(start, min(start + 1000, count), dtype=np.int64)
        slots = np.zeros(len(positions), np.int32)
        tokens.append(sampler.sample(row.expand(len(slots), -1), slots, positions)[0].numpy())
    return np.concatenate(tokens)


def reference_logits(logits: Tensor, sampling: SlotSampling) -> Tensor:
    """[V] float64: one row's logits after vLLM's processors, by sorting; -inf where a token is cut away."""
    logits = (logits / sampling.temperature).double()
    probs = logits.softmax(0)
    logits = logits.masked_fill(probs < sampling.min_p * probs.max(), -math.inf)
    ascending, order = logits.sort()
    if sampling.top_k > 0:
        kth = ascending[max(len(logits) - sampling.top_k, 0)]
        ascending = ascending.masked_fill(ascending < kth, -math.inf)
    if sampling.top_p < 1.0:
        unneeded = ascending.softmax(0).cumsum(0) <= 1 - sampling.top_p
        unneeded[-1] = False
        ascending = ascending.masked_fill(unneeded, -math.inf)
    return torch.empty_like(ascending).scatter_(0, order, ascending)


COMBINATIONS = list(product((0.6, 1.0, 1.7), (0, 1, 7, 5000), (1.0, 0.9, 0.5, 1e-6), (0.0, 0.02)))


@pytest.mark.parametrize("vocab_size", [1, 5, 333, 3001])
def test_same_support_and_same_token_as_the_reference(vocab_size: int) -> None:
    slots = [
        settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=SEED + index)
        for index, (temperature, top_k, top_p, min_p) in enumerate(COMBINATIONS)
    ]
    logits = torch.randn(len(slots), vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    sampler = sampler_of(vocab_size, *slots)
    token_ids, logprobs = run(sampler, logits)
    assert logprobs is None
    num_cut = 0
    for row, sampling in enumerate(slots):
        expected = reference_logits(logits[row], sampling)
        kept = expected > -math.inf
        assert torch.equal(sampler.kept[row], kept), sampling
        seed = torch.tensor([sampling.seed - (1 << 64)])
        noise = gumbel_noise(seed, torch.tensor([row]), 0, vocab_size)[0]
        assert token_ids[row] == (expected + noise).argmax(), sampling
        num_cut += int((~kept).sum())
    assert vocab_size == 1 or num_cut > vocab_size, "the settings of this test cut nothing"


@pytest.mark.parametrize(
    "limits", [{"top_p": 0.8}, {"top_k": 11, "top_p": 0.8}, {"min_p": 0.3, "top_p": 0.8}]
)
def test_ties_at_the_cut_are_all_kept(limits: dict[str, Any]) -> None:
    """Whole-number logits tie all the time; the cut is then found by trying every value."""
    logits = torch.randint(-4, 5, (20, 200), generator=torch.Generator().manual_seed(2)).float()
    sampling = settings(**limits)
    sampler = sampler_of(200, *[sampling] * 20)
    run(sampler, logits)
    for row in range(20):
        kept = logits[row] >= logits[row].max() + math.log(max(sampling.min_p, 1e-30))
        if sampling.top_k:
            kept &= logits[row] >= logits[row].sort(descending=True).values[sampling.top_k - 1]
        mass = torch.where(kept, logits[row].double().exp(), 0.0)
        cut = next(
            value for value in range(4, -5, -1) if mass[logits[row] >= value].sum() >= 0.8 * mass.sum()
        )
        assert torch.equal(sampler.kept[row], kept & (logits[row] >= cut))


def test_top_k_one_draws_from_all_the_best() -> None:
    assert set(draw([1.0, 5.0, 5.0, -2.0, 5.0], settings(top_k=1), 200)) == {1, 2, 4}


def test_top_p_counts_the_mass_of_all_ties_that_top_k_kept() -> None:
    """The best token has 0.45 of the mass of three tokens, but 1 % of that of the 200 that top_k = 3 keeps."""
    logits = [0.5, *[0.0] * 199]
    assert len(set(draw(logits, settings(top_k=3, top_p=0.4), 3000))) == 200
    assert set(draw(logits[:3], settings(top_k=3, top_p=0.4), 100)) == {0}


def test_zeros_of_both_signs_are_equal() -> None:
    logits = torch.tensor([[-0.0, 0.0, -1.0]])
    assert run(sampler_of(3, settings(**GREEDY)), logits)[0].tolist() == [0]
    for limits in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}):
        assert set(draw(logits[0], settings(**limits), 200)) == {0, 1}


def test_greedy_takes_the_first_of_the_best_whatever_else_is_set() -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(4))
    logits[1, [900, 17, 400]] = 9.0
    sampling = settings(temperature=0.0, top_k=3, top_p=0.1, min_p=0.5)
    token_ids, _ = run(sampler_of(1000, *[sampling] * 4), logits)
    assert token_ids.tolist() == [int(row.argmax()) for row in logits]
    assert token_ids[1] == 17
    assert token_ids.dtype == torch.int64


@pytest.mark.parametrize("greedy", [True, False])
def test_end_tokens_are_suppressed_until_their_position(greedy: bool) -> None:
    logits = torch.zeros(5, 50)
    logits[:, 7], logits[:, 8], logits[:, 9] = 90.0, 60.0, 30.0
    changes = GREEDY if greedy else {"top_k": 5}
    early = settings(stop_ids=(7, 8), stop_from=3, logprobs=0, **changes)
    before = logits.clone()
    token_ids, logprobs = run(sampler_of(50, *[early] * 5), logits)
    assert token_ids.tolist() == [9, 9, 9, 7, 7]
    assert torch.equal(logits, before)
    raw = logits.double().log_softmax(1)[range(5), token_ids]
    assert logprobs is not None
    assert torch.allclose(logprobs.double(), raw, rtol=1e-6), "logprobs are of the raw logits"


def test_logprobs_are_log_softmax_of_the_raw_logits_for_the_whole_batch() -> None:
    logits = torch.randn(6, 2000, generator=torch.Generator().manual_seed(5)) * 4
    slots = [settings(**GREEDY), settings(temperature=0.3, top_k=5, logprobs=0), *[settings()] * 4]
    token_ids, logprobs = run(sampler_of(2000, *slots), logits)
    expected = logits.double().log_softmax(1).gather(1, token_ids[:, None])[:, 0]
    assert logprobs is not None
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("vocab_size", "num_top"), [(2000, 20), (333, 1), (333, 0), (5, 20)])
@pytest.mark.parametrize("kind", ["random", "tied", "zeros"])
def test_the_most_likely_tokens_with_their_ranks(kind: str, vocab_size: int, num_top: int) -> None:
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(8)) * 2
    if kind == "tied":
        logits = logits.round()
    elif kind == "zeros":  # of either sign: they are equal
        logits = torch.where(logits > 0, 0.0, -0.0)
    sampler = sampler_of(vocab_size, *[settings(logprobs=num_top)] * 4)
    chosen, table = sampler.sample(logits, np.arange(4, dtype=np.int32), np.zeros(4, np.int64))
    assert table is not None
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :num_top]
    expected_ids = torch.cat((chosen[:, None], order), 1)
    assert torch.equal(table.token_ids, expected_ids)
    expected = logits.double().log_softmax(1).gather(1, expected_ids)
    torch.testing.assert_close(table.logprobs.double(), expected, atol=1e-6, rtol=1e-6)
    greater = logits[:, None, :] > logits.gather(1, expected_ids)[:, :, None]
    assert torch.equal(table.ranks, greater.sum(2) + 1)


def test_as_many_tokens_as_the_row_that_wants_most() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(9))
    slots = [settings(logprobs=num_top) for num_top in (None, 0, 7, 2)]
    _, table = sampler_of(50, *slots).sample(logits, np.arange(4, dtype=np.int32), np.zeros(4, np.int64))
    assert table is not None
    assert table.token_ids.shape == table.logprobs.shape == table.ranks.shape == (4, 8)


def test_a_reopened_slot_forgets_what_was_set_before() -> None:
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(6))
    best = int(logits.argmax())
    first = settings(**GREEDY, stop_ids=(3, 4, best), stop_from=10, logprobs=0)
    sampler = sampler_of(100, first)
    token_ids, logprobs = run(sampler, logits)
    assert token_ids.item() != best
    assert logprobs is not None
    sampler.open(0, settings(**GREEDY, stop_ids=(3,), stop_from=10))
    token_ids, logprobs = run(sampler, logits)
    assert token_ids.item() == best
    assert logprobs is None


@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf, "all -inf"])
def test_a_broken_row_gets_no_token_and_harms_no_other(poison: float | str) -> None:
    slots = [settings(**GREEDY), settings(), settings(top_k=2), settings(top_p=0.5), settings(min_p=0.5)]
    slots = [*slots, settings(top_k=3, top_p=0.5, min_p=0.1), settings(logprobs=0)]
    whole = torch.randn(14, 40, generator=torch.Generator().manual_seed(7))
    broken = whole.clone()
    if isinstance(poison, str):
        broken[::2] = -math.inf
    else:
        broken[::2, 25] = poison
    sampler = sampler_of(40, *[slot for slot in slots for _ in range(2)])
    expected, _ = run(sampler, whole)
    token_ids, logprobs = run(sampler, broken)
    assert token_ids[::2].tolist() == [NO_TOKEN] * 7
    assert torch.equal(token_ids[1::2], expected[1::2])
    assert logprobs is not None
    assert not logprobs[::2].isfinite().any()
    assert logprobs[1::2].isfinite().all()


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    """Pairs of draws are spread like products of probabilities."""
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    pairs = torch.outer(logits.softmax(0), logits.softmax(0)).double().flatten()
    tokens = draw(logits, settings(), 60_001)
    others = draw(logits, settings(seed=SEED + 1), 60_001)
    assert chi_square(tokens[:-1:2] * 4 + tokens[1::2], pairs) < chi_square_limit(16)
    assert chi_square(tokens * 4 + others, pairs) < chi_square_limit(16)
    assert chi_square(tokens * 4 + tokens, pairs) > chi_square_limit(16)


def test_another_seed_or_position_gives_other_tokens() -> None:
    tokens = draw(torch.zeros(5000), settings(), 100)
    assert np.mean(tokens != draw(torch.zeros(5000), settings(seed=SEED ^ 1 << 40), 100)) > 0.95
    assert len(set(tokens.tolist())) > 90
    assert np.array_equal(tokens, draw(torch.zeros(5000), settings(), 100))


def test_no_rows_give_no_tokens() -> None:
    token_ids, logprobs = run(sampler_of(10), torch.empty(0, 10))
    assert token_ids.shape == (0,)
    assert logprobs is None

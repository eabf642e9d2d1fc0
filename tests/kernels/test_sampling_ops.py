"""The sampler's largest scores in each back end against their definitions, and the door."""

import math

import pytest
import torch
from sampling_cases import (
    MANY,
    SHAPES,
    everything,
    gumbel_arguments,
    in_reference,
    mass_arguments,
    random_logits,
    same,
    there,
)

from kvshard.kernels import sampling_ops
from kvshard.kernels.cpu import sampling as cpu_sampling
from kvshard.kernels.cpu import sampling_torch

# ------------------------------------------------------------------------------------------------ largest score


@SHAPES
@pytest.mark.parametrize("first_token", [0, 6, (1 << 32) - 20000], ids=str)
def test_row_argmax(ops, size, first_token, rows, columns):
    scores = random_logits(rows, size(columns))
    expected = in_reference("row_argmax", scores, first_token=first_token)
    assert torch.equal(ops.row_argmax(scores, first_token).cpu(), expected)
    assert not torch.equal(ops.row_argmax(scores, first_token + 1).cpu(), expected)


SPECIAL = [
    ([1.0, 3.0, 3.0, 2.0], 3.0, 1),
    ([-0.0, 0.0, -1.0], 0.0, 0),
    ([-1.0, 0.0, -0.0], 0.0, 1),
    ([-math.inf, -math.inf], -math.inf, None),
    ([-math.inf, math.inf, math.inf], math.inf, None),
    ([-5.0, -3.0, -4.0], -3.0, 1),
    ([1.0, math.inf, math.nan, math.nan], math.nan, None),
    ([1.0, -math.nan, math.inf], math.nan, None),
]


@pytest.mark.parametrize("place", [0, 5000])
def test_row_argmax_of_ties_zeros_and_what_is_not_finite(ops, place):
    """The values stand together, or far behind others that are smaller."""
    scores = torch.full((len(SPECIAL), 5000 + 4), -math.inf)
    for row, (values, _, _) in enumerate(SPECIAL):
        scores[row, place : place + len(values)] = torch.tensor(values)
    packed = ops.row_argmax(scores, 70)
    assert torch.equal(packed.cpu(), in_reference("row_argmax", scores, first_token=70))
    best, token = ops.best_of_ranks(packed[None])
    for row, (_, value, column) in enumerate(SPECIAL):
        assert best[row].item() == value or (math.isnan(value) and best[row].isnan())
        assert math.copysign(1, best[row].item()) == 1 or value < 0 or math.isnan(value)
        assert token[row].item() == (-1 if column is None else 70 + place + column)


@pytest.mark.parametrize("rows", [1, 5, 64, 131])
@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_best_of_ranks(ops, ranks, rows):
    """Scores of both signs with ties between ranks, and rows that are broken on one rank or on all."""
    scores = random_logits(ranks * rows, 1)[:, 0].reshape(ranks, rows).round()
    scores[-1, 0], scores[0, -1] = math.nan, math.inf
    scores[:, rows // 2] = -math.inf
    packed = torch.stack(
        [
            in_reference("row_argmax", part[:, None], first_token=1000 * rank)
            for rank, part in enumerate(scores)
        ]
    )
    best, token = in_reference("best_of_ranks", packed)

    def is_right(got):  # by bits, as NaN is not equal to itself
        return same((got[0].view(torch.int32), got[1]), (best.view(torch.int32), token))

    assert is_right(ops.best_of_ranks(there(packed)))
    is_finite = best.isfinite()
    assert torch.equal(token[is_finite], 1000 * scores.cpu()[:, is_finite].argmax(0))
    assert torch.equal(best[is_finite], scores.cpu()[:, is_finite].amax(0) + 0.0)
    if rows > 3:
        assert not is_right(ops.best_of_ranks(there(packed.roll(1, 1))))


def gumbel_reference(arguments):
    *rest, first_token = arguments.values()
    return in_reference("gumbel_argmax", *rest, first_token=first_token)


@pytest.mark.parametrize("columns", [1, 7, 1003, MANY])
@pytest.mark.parametrize("first_token", [0, 6, 49151, (1 << 32) - 20000], ids=str)
def test_gumbel_argmax(ops, size, columns, first_token):
    arguments = gumbel_arguments(size(columns), first_token)
    assert torch.equal(ops.gumbel_argmax(*arguments.values()).cpu(), gumbel_reference(arguments))


@pytest.mark.parametrize("spread", [0.0, 1e-3, 30.0])
def test_gumbel_argmax_of_many_rows_of_few_columns(ops, spread):
    """The winner's noise is small here, which no bound may overlook."""
    rows = 24 if ops.__name__.endswith("triton.sampling") else 5000
    arguments = gumbel_arguments(1)
    arguments["logits"] = random_logits(rows, 3) * spread
    for name in ("temperature", "cut", "seeds", "places", "sampled"):
        arguments[name] = arguments[name][:1].repeat(rows)
    arguments["places"] = torch.arange(rows)
    assert torch.equal(ops.gumbel_argmax(*arguments.values()).cpu(), gumbel_reference(arguments))


def test_rare_noise_wins_over_a_larger_logit(ops):
    """A token with noise above 12 against one that is ahead of it by less: no bound of all noise may overlook it."""
    places, count = torch.arange(64, device="cpu"), 40000
    seeds = torch.zeros_like(places)
    noise = in_reference("gumbel_noise", seeds, places, 0, count)
    noise[:, :5000] = 0  # the winner stands in another tile than the first token
    rows = (noise.amax(1) > 12).nonzero()[:8, 0]
    assert len(rows) == 8
    winner, largest = noise[rows].argmax(1), noise[rows].amax(1)
    logits = torch.full((8, 5002), -math.inf, device="cpu")
    for row in range(8):
        # The first token has what is nearly the winner's score; the winner is at column 5001.
        shift = int(winner[row]) - 5001
        first = in_reference("gumbel_noise", seeds[:1], places[rows[row : row + 1]], shift, 1)[0, 0]
        logits[row, 0], logits[row, 5001] = largest[row] - first - 0.01, 0.0
        arguments = [torch.ones(1), torch.full((1,), -math.inf), seeds[:1], places[rows[row : row + 1]]]
        packed = ops.gumbel_argmax(
            there(logits[row : row + 1]), *map(there, arguments), torch.ones(1, dtype=torch.bool), shift
        )
        best, token = ops.best_of_ranks(packed[None])
        assert token.item() == shift + 5001
        assert best.item() == largest[row].item()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logits", lambda x: x.roll(1, 1)),
        ("temperature", lambda x: x * 1.3),
        ("cut", lambda x: x + 9),
        ("seeds", lambda x: x ^ 1 << 40),
        ("places", lambda x: x ^ 1),
        ("places", lambda x: x ^ 1 << 32),
        ("sampled", lambda x: ~x),
        ("first_token", lambda x: x + 1),
    ],
)
def test_gumbel_argmax_wrong_input_fails(ops, name, change):
    arguments = gumbel_arguments(1003)
    expected = gumbel_reference(arguments)
    arguments[name] = change(arguments[name])
    assert not torch.equal(ops.gumbel_argmax(*arguments.values()).cpu(), expected)


def test_gumbel_argmax_of_broken_rows(ops):
    """NaN and infinity win; a row below its cut has no score; others do not notice."""
    arguments = gumbel_arguments(1003)
    expected = gumbel_reference(arguments)
    logits = arguments["logits"].clone()
    logits[0, [300, 900]], logits[0, 200] = math.nan, math.inf
    logits[1, 700] = math.inf
    arguments["logits"], arguments["cut"] = logits, arguments["cut"].clone()
    arguments["cut"][2] = 100.0
    packed = ops.gumbel_argmax(*arguments.values())
    best, token = ops.best_of_ranks(packed[None])
    assert best[0].isnan()
    assert best[1:3].tolist() == [math.inf, -math.inf]
    assert token[:3].tolist() == [-1] * 3
    assert torch.equal(packed.cpu(), gumbel_reference(arguments))
    assert torch.equal(packed[3:].cpu(), expected[3:])


# ------------------------------------------------------------------------------------------------ the door


def test_without_a_compiler_the_cpu_back_end_is_torch(monkeypatch):
    arguments = gumbel_arguments(1003)
    expected = everything(sampling_torch, arguments["logits"], 0, 1003, arguments)
    monkeypatch.setattr(cpu_sampling, "_library", lambda: None)
    assert same(everything(cpu_sampling, arguments["logits"], 0, 1003, arguments), expected)


def test_cpu_tensors_go_to_the_cpu_back_end():
    arguments = gumbel_arguments(1003)
    first_token = arguments.pop("first_token")
    got = sampling_ops.gumbel_argmax(*arguments.values(), first_token=first_token)
    assert torch.equal(got, cpu_sampling.gumbel_argmax(*arguments.values(), first_token))
    assert same(sampling_ops.best_of_ranks(got[None]), cpu_sampling.best_of_ranks(got[None]))
    masses = mass_arguments(1003, 8)
    logits, prefix = masses["logits"], masses["prefix"]
    pairs = [
        (sampling_ops.row_argmax(logits, first_token=3), cpu_sampling.row_argmax(logits, 3)),
        (
            sampling_ops.row_mass(logits, logits.amax(1)),
            cpu_sampling.row_mass(logits, logits.amax(1)),
        ),
        (sampling_ops.count_histogram(logits, prefix, 8), cpu_sampling.count_histogram(logits, prefix, 8)),
        (sampling_ops.mass_histogram(*masses.values()), cpu_sampling.mass_histogram(*masses.values())),
    ]
    assert all(torch.equal(*pair) for pair in pairs)


BAD = {
    "logits": [torch.zeros(5), torch.zeros(5, 0), torch.zeros(5, 9).double(), torch.zeros(9, 5).T],
    "temperature": [torch.ones(4), torch.ones(5).double(), torch.ones(5, 1)],
    "cut": [torch.ones(4), torch.ones(10)[::2]],
    "seeds": [torch.ones(5), torch.ones(4, dtype=torch.int64)],
    "places": [torch.ones(5, dtype=torch.int32)],
    "sampled": [torch.ones(5)],
    "first_token": [-1, (1 << 32) - 8],
}


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, values in BAD.items() for bad in values])
def test_gumbel_argmax_names_what_does_not_fit(name, bad):
    arguments = gumbel_arguments(9) | {name: bad}
    first_token = arguments.pop("first_token")
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        sampling_ops.gumbel_argmax(*arguments.values(), first_token=first_token)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("max_logits", torch.zeros(4)),
        ("prefix", torch.zeros(5)),
        ("shift", 4),
        ("shift", 32),
        ("cut", torch.zeros(5).double()),
    ],
)
def test_mass_histogram_names_what_does_not_fit(name, bad):
    arguments = mass_arguments(9, 8) | {name: bad}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        sampling_ops.mass_histogram(*arguments.values())
    if name in ("prefix", "shift"):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            sampling_ops.count_histogram(arguments["logits"], arguments["prefix"], arguments["shift"])
    if name == "max_logits":
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            sampling_ops.row_mass(arguments["logits"], bad)


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match=r"^device: expected one of cuda, cpu, got meta$"):
        sampling_ops.row_argmax(torch.empty(2, 3, device="meta"), first_token=0)
    with pytest.raises(ValueError, match=r"^scores: expected"):
        sampling_ops.row_argmax(torch.zeros(3), first_token=0)


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(2, 3),
        torch.zeros(3, 2).long().T,
        torch.zeros(0, 3).long(),
    ],
)
def test_best_of_ranks_names_what_does_not_fit(bad):
    with pytest.raises(ValueError, match=r"^packed: expected"):
        sampling_ops.best_of_ranks(bad)

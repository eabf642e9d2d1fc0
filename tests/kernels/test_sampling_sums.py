"""The sampler's masses and histograms in each back end against their definitions, and what no result depends on."""

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
    prefixes,
    random_logits,
    same,
    there,
)
from tolerances import assert_within

from kvshard.kernels.cpu import sampling as cpu_sampling

# ------------------------------------------------------------------------------------------------ mass


@SHAPES
def test_row_mass(ops, size, rows, columns):
    logits = random_logits(rows, size(columns))
    max_logits = logits.amax(1)
    got = ops.row_mass(logits, max_logits)
    assert got.dtype == torch.int64
    assert_within(got.double(), in_reference("row_mass", logits, max_logits).double(), "mass")


def test_mass_of_each_difference(ops):
    """From one to nothing, an entry a row."""
    differences = torch.cat((torch.linspace(-31.0, 0.0, 57), torch.tensor([-1e30, -math.inf, -0.0])))
    got, zeros = ops.row_mass(differences[:, None], torch.zeros(60)), torch.zeros(60)
    assert_within(got.double(), in_reference("row_mass", differences[:, None], zeros).double(), "mass")
    assert got[[56, 59]].tolist() == [1 << 40] * 2
    assert got[[0, 57, 58]].tolist() == [0] * 3


def test_row_mass_wrong_maximum_fails(ops):
    logits = random_logits(3, 500)
    got = ops.row_mass(logits, logits.amax(1) + 1e-4)
    with pytest.raises(AssertionError, match="not close"):
        assert_within(got.double(), in_reference("row_mass", logits, logits.amax(1)).double(), "mass")


# ------------------------------------------------------------------------------------------------ histograms


@pytest.mark.parametrize("shift", [24, 16, 8, 0])
@SHAPES
def test_count_histogram(ops, size, rows, columns, shift):
    logits = random_logits(rows, size(columns)).bfloat16().float()  # so that keys are shared in every round
    prefix = prefixes(logits, shift)
    got = ops.count_histogram(logits, prefix, shift)
    assert torch.equal(got.cpu(), in_reference("count_histogram", logits, prefix, shift))
    assert bool((got.sum(1) > 0).equal(prefix >= 0))


def test_count_histogram_of_the_ends_of_the_keys(ops):
    values = [-math.nan, -math.inf, -3.4e38, -1e-45, -0.0, 0.0, 1e-45, 3.4e38, math.inf, math.nan]
    for shift in (24, 16, 8, 0):
        logits = torch.tensor(values)[:, None].repeat(1, 5)
        prefix = in_reference("ordered_keys", logits)[:, 0] >> (shift + 8)
        got = ops.count_histogram(logits, there(prefix), shift)
        assert torch.equal(got.cpu(), in_reference("count_histogram", logits, prefix, shift))
        assert (got.sum(1) == 5).all()


def assert_same_masses(got, arguments):
    expected = in_reference("mass_histogram", *arguments.values())
    assert_within(got.double(), expected.double(), "mass")


@pytest.mark.parametrize("shift", [24, 16, 8, 0])
@pytest.mark.parametrize("columns", [1, 7, 1003, MANY])
def test_mass_histogram(ops, size, columns, shift):
    arguments = mass_arguments(size(columns), shift)
    assert_same_masses(ops.mass_histogram(*arguments.values()), arguments)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logits", lambda x: x + 0.25),
        ("temperature", lambda x: x * 1.001),
        ("cut", lambda x: x + 99),
        ("max_logits", lambda x: x + 1e-4),
        ("prefix", lambda x: x + 1),
        ("prefix", lambda x: torch.zeros_like(x) - 1),
        ("shift", lambda x: x - 8),
    ],
)
def test_mass_histogram_wrong_input_fails(ops, name, change):
    arguments = mass_arguments(1003, 16)
    wrong = arguments | {name: change(arguments[name])}
    with pytest.raises(AssertionError, match="not close"):
        assert_same_masses(ops.mass_histogram(*wrong.values()), arguments)


@pytest.mark.parametrize(
    ("name", "change"), [("prefix", lambda x: x + 1), ("shift", lambda x: x - 8)], ids=["prefix", "shift"]
)
def test_count_histogram_wrong_input_fails(ops, name, change):
    logits = random_logits(3, 1003)
    right = {"prefix": prefixes(logits, 16), "shift": 16}
    wrong = right | {name: change(right[name])}
    got = ops.count_histogram(logits, **wrong)
    assert not torch.equal(got.cpu(), in_reference("count_histogram", logits, *right.values()))


# ------------------------------------------------------------------------------------------------ columns and threads


@pytest.mark.parametrize("border", [1, 6, 4099])
def test_results_do_not_depend_on_how_columns_are_spread(ops, border):
    arguments = gumbel_arguments(5003, first_token=0)
    logits = arguments["logits"]
    packed, sums = everything(ops, logits, 0, 5003, arguments)
    parts = [everything(ops, logits, *ends, arguments) for ends in ((0, border), (border, 5003))]
    assert torch.equal(parts[0][1] + parts[1][1], sums)
    assert torch.equal(torch.maximum(parts[0][0], parts[1][0]), packed)


@pytest.mark.parametrize("threads", [2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    arguments = gumbel_arguments(40000)
    logits = arguments["logits"].round()
    expected = everything(cpu_sampling, logits, 0, 40000, arguments)
    torch.set_num_threads(threads)  # the fixture of all kernel tests sets it back
    assert same(everything(cpu_sampling, logits, 0, 40000, arguments), expected)


def test_broken_rows_harm_no_others(ops):
    """Sums of the broken rows mean nothing, but do not reach beyond them."""
    arguments = gumbel_arguments(1003)
    logits = arguments["logits"].clone()
    expected = everything(ops, logits, 0, 1003, arguments)
    for row, poison in ((0, math.nan), (2, math.inf)):
        logits[row, 5] = poison
    logits[4] = -math.inf
    got = everything(ops, logits, 0, 1003, arguments)
    assert same([x[[1, 3]] for x in got], [x[[1, 3]] for x in expected])


def test_no_rows(ops):
    none, long = torch.empty(0), torch.empty(0, dtype=torch.int64)
    logits = torch.empty(0, 9)
    assert ops.row_argmax(logits, 0).shape == (0,)
    assert ops.gumbel_argmax(logits, none, none, long, long, long.bool(), 0).shape == (0,)
    assert [x.shape for x in ops.best_of_ranks(long[None])] == [(0,), (0,)]
    assert ops.row_mass(logits, none).shape == (0,)
    assert ops.mass_histogram(logits, none, none, none, long, 0).shape == (0, 256)

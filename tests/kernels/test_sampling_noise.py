"""The sampler's random words and noise in each back end against their definitions."""

import math

import pytest
import torch
from sampling_cases import PLACES, SEEDS, in_reference, there

from kvshard.kernels.cpu import sampling as cpu_sampling

ALL_BITS = 1 << 23


@pytest.mark.parametrize("first_token", [0, 1, 6, 49151, (1 << 32) - 600], ids=str)
@pytest.mark.parametrize("count", [1, 3, 600])
def test_random_words_are_bit_equal(ops, first_token, count):
    got = ops.philox(there(SEEDS), there(PLACES), first_token, count)
    assert torch.equal(got.cpu(), in_reference("philox", SEEDS, PLACES, first_token, count))


@pytest.mark.parametrize(
    ("seed", "place", "first_token"),
    [(1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 1 << 32, 0), (0, 0, 4)],
    ids=str,
)
def test_random_words_of_another_name_differ(ops, seed, place, first_token):
    got = ops.philox(there(SEEDS ^ seed), there(PLACES ^ place), first_token, 200)
    assert (got.cpu() != in_reference("philox", SEEDS, PLACES, 0, 200)).float().mean() > 0.99


def units_apart(got, exact):
    """How many units in the last place of the exact value, given in float64, lie between."""
    size = exact.abs().float()
    unit = torch.nextafter(size, torch.tensor(math.inf, device="cpu")).double() - size.double()
    return ((got.cpu().double() - exact).abs() / unit).max()


def some_bits():
    """Both ends, the neighbours of u = 1/e, where the noise passes zero, and some more."""
    middle = int(ALL_BITS / math.e)
    generator = torch.Generator().manual_seed(1)
    random = torch.randint(0, ALL_BITS, (2000,), generator=generator, device="cpu")
    ends = torch.arange(500, device="cpu")
    return torch.cat((ends, ALL_BITS - 1 - ends, middle - 500 + torch.arange(1000, device="cpu"), random))


def test_noise_is_within_two_units_in_the_last_place(ops):
    bits = torch.arange(ALL_BITS, device="cpu") if ops is cpu_sampling else some_bits()
    uniform = (bits.double() + 0.5) / ALL_BITS
    exact = -torch.log(-torch.log(uniform))
    assert units_apart(ops.gumbel(there(bits)), exact) <= 2
    assert units_apart(ops.gumbel(there(bits[:500] ^ 1)), exact[:500]) > 2


def test_the_bound_that_spares_noise_holds_for_all_bits():
    library = cpu_sampling._library()
    if library is None:
        pytest.skip("no compiler here")
    bits = torch.arange(ALL_BITS)
    noise, bound = torch.empty(2, ALL_BITS)
    library.sampling_gumbel(bits.data_ptr(), ALL_BITS, noise.data_ptr(), bound.data_ptr())
    assert (bound > noise).all()
    assert (bound - noise)[ALL_BITS // 2 :].max() < 0.5, "a bound that is no use"

"""The sampler's operations of each back end against their definitions."""

import math
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from tolerances import assert_within

from kvshard.kernels import sampling_ops, sampling_reference
from kvshard.kernels.cpu import sampling as cpu_sampling
from kvshard.kernels.cpu import sampling_torch

ALL_BITS = 1 << 23
SEEDS = torch.tensor([0, -1, 0x123456789ABCDEF, -(1 << 63), 77])
POSITIONS = torch.tensor([0, 1, 1234, (1 << 31) + 5, (1 << 32) - 1])
MANY = 16389  # more than one thread's or program's share of a row
SHAPES = pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (3, 7), (2, 256), (5, 1003), (2, MANY)], ids=str
)


@pytest.fixture(params=["c", "torch", "triton"])
def ops(request: pytest.FixtureRequest) -> ModuleType:
    """Each back end that can run here, called behind the door."""
    if request.param == "torch":
        return sampling_torch
    if request.param == "c":
        if cpu_sampling._library() is None:
            pytest.skip("no compiler here")
        return cpu_sampling
    pytest.importorskip("triton")
    from kvshard.kernels.triton import sampling

    return sampling


@pytest.fixture
def size(ops: ModuleType) -> Callable[[int], int]:
    """Columns of a case: Triton's programs have smaller shares, and the interpreter is slow."""
    return lambda columns: 4101 if columns == MANY and ops.__name__.endswith("triton.sampling") else columns


@pytest.fixture(autouse=True)
def _default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiled Triton kernels take tensors on the GPU."""
    is_triton = "ops" in request.fixturenames and request.getfixturevalue("ops").__name__.endswith(
        "triton.sampling"
    )
    with torch.device("cuda" if is_triton and torch.cuda.is_available() else "cpu"):
        yield


def random_logits(rows, columns, seed=0):
    """A view of wider rows."""
    wide = torch.randn(rows, columns + 3, generator=torch.Generator().manual_seed(seed), device="cpu") * 3
    return there(wide)[:, 1 : columns + 1]


def there(tensor):
    return tensor.to(torch.get_default_device())


def same(got, expected):
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True))


def in_reference(name, *arguments, **options):
    """The definition, on CPU."""
    with torch.device("cpu"):
        moved = [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
        return getattr(sampling_reference, name)(*moved, **options)


# ------------------------------------------------------------------------------------------------ noise


@pytest.mark.parametrize("first_token", [0, 1, 6, 49151, (1 << 34) - 600], ids=str)
@pytest.mark.parametrize("count", [1, 3, 600])
def test_random_words_are_bit_equal(ops, first_token, count):
    got = ops.philox(there(SEEDS), there(POSITIONS), first_token, count)
    assert torch.equal(got.cpu(), in_reference("philox", SEEDS, POSITIONS, first_token, count))


@pytest.mark.parametrize(
    ("seed", "position", "first_token"), [(1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 0, 4)], ids=str
)
def test_random_words_of_another_name_differ(ops, seed, position, first_token):
    got = ops.philox(there(SEEDS ^ seed), there(POSITIONS ^ position), first_token, 200)
    assert (got.cpu() != in_reference("philox", SEEDS, POSITIONS, 0, 200)).float().mean() > 0.99


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
    assert noise.max() < 16.6356, "the bound of all noise, LARGEST_NOISE"
    assert (bound - noise)[ALL_BITS // 2 :].max() < 0.5, "a bound that is no use"


# ------------------------------------------------------------------------------------------------ largest score


@SHAPES
def test_row_argmax(ops, size, rows, columns):
    scores = random_logits(rows, size(columns))
    assert same(ops.row_argmax(scores), in_reference("row_argmax", scores))


SPECIAL = [
    ([1.0, 3.0, 3.0, 2.0], 3.0, 1),
    ([-0.0, 0.0, -1.0], 0.0, 0),
    ([-1.0, 0.0, -0.0], 0.0, 1),
    ([-math.inf, -math.inf], -math.inf, 0),
    ([-math.inf, math.inf, math.inf], math.inf, 1),
    ([-5.0, -3.0, -4.0], -3.0, 1),
    ([1.0, math.inf, math.nan, math.nan], math.nan, 2),
    ([1.0, -math.nan, math.inf], math.nan, 1),
]


@pytest.mark.parametrize("place", [0, 5000])
def test_row_argmax_of_ties_zeros_and_what_is_not_finite(ops, place):
    """The values stand together, or far behind others that are smaller."""
    scores = torch.full((len(SPECIAL), 5000 + 4), -math.inf)
    for row, (values, _, _) in enumerate(SPECIAL):
        scores[row, place : place + len(values)] = torch.tensor(values)
    best, column = ops.row_argmax(scores)
    for row, (_, value, where) in enumerate(SPECIAL):
        assert best[row].item() == value or (math.isnan(value) and best[row].isnan())
        assert math.copysign(1, best[row].item()) == 1 or value < 0 or math.isnan(value)
        assert column[row].item() == (0 if value == -math.inf else where + place)


def gumbel_arguments(columns, first_token=6):
    """Five rows: sampled or not, with a cut or none."""
    return {
        "logits": random_logits(5, columns),
        "temperature": torch.tensor([1.0, 0.6, 1.7, 1.0, 0.9]),
        "cut": torch.tensor([-math.inf, -1.0, 2.0, -math.inf, 0.5]),
        "seeds": there(SEEDS),
        "positions": there(POSITIONS),
        "sampled": torch.tensor([True, True, True, False, False]),
        "first_token": first_token,
    }


def gumbel_reference(arguments):
    arguments = dict(arguments)
    return in_reference("gumbel_argmax", *list(arguments.values())[:-1], first_token=arguments["first_token"])


@pytest.mark.parametrize("columns", [1, 7, 1003, MANY])
@pytest.mark.parametrize("first_token", [0, 6, 49151, (1 << 34) - 20000], ids=str)
def test_gumbel_argmax(ops, size, columns, first_token):
    arguments = gumbel_arguments(size(columns), first_token)
    assert same(ops.gumbel_argmax(*arguments.values()), gumbel_reference(arguments))


@pytest.mark.parametrize("spread", [0.0, 1e-3, 30.0])
def test_gumbel_argmax_of_many_rows_of_few_columns(ops, spread):
    """The winner's noise is small here, which no bound may overlook."""
    rows = 24 if ops.__name__.endswith("triton.sampling") else 5000
    arguments = gumbel_arguments(1)
    arguments["logits"] = random_logits(rows, 3) * spread
    for name in ("temperature", "cut", "seeds", "positions", "sampled"):
        arguments[name] = arguments[name][:1].repeat(rows)
    arguments["positions"] = torch.arange(rows)
    assert same(ops.gumbel_argmax(*arguments.values()), gumbel_reference(arguments))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logits", lambda x: x.roll(1, 1)),
        ("temperature", lambda x: x * 1.3),
        ("cut", lambda x: x + 9),
        ("seeds", lambda x: x ^ 1 << 40),
        ("positions", lambda x: x ^ 1),
        ("sampled", lambda x: ~x),
        ("first_token", lambda x: x + 1),
    ],
)
def test_gumbel_argmax_wrong_input_fails(ops, name, change):
    arguments = gumbel_arguments(1003)
    expected = gumbel_reference(arguments)
    arguments[name] = change(arguments[name])
    assert not same(ops.gumbel_argmax(*arguments.values()), expected)


def test_gumbel_argmax_of_broken_rows(ops):
    """NaN and infinity win, of several NaNs the first one; a row below its cut has no score; others do not notice."""
    arguments = gumbel_arguments(1003)
    expected = gumbel_reference(arguments)
    logits = arguments["logits"].clone()
    logits[0, [300, 900]], logits[0, 200] = math.nan, math.inf
    logits[1, 700] = math.inf
    arguments["logits"], arguments["cut"] = logits, arguments["cut"].clone()
    arguments["cut"][2] = 100.0
    best, column = ops.gumbel_argmax(*arguments.values())
    assert best[0].isnan()
    assert best[1:3].tolist() == [math.inf, -math.inf]
    assert column[:3].tolist() == [300, 700, 0]
    assert same((best[3:], column[3:]), (expected[0][3:], expected[1][3:]))


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


def prefixes(logits, shift):
    """The leading bits of a key of each row that others share; no row of more than two is left out but the third."""
    keys = in_reference("ordered_keys", logits)
    prefix = keys[:, len(keys[0]) // 2] >> (shift + 8)
    if len(prefix) > 2:
        prefix[2] = -1
    return there(prefix)


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


def mass_arguments(columns, shift):
    logits = random_logits(5, columns).bfloat16().float()
    temperature = torch.tensor([1.0, 0.6, 1.7, 1.0, 0.9])
    scaled = logits / temperature[:, None]
    return {
        "logits": logits,
        "temperature": temperature,
        "cut": torch.tensor([-math.inf, -1.0, 2.0, -math.inf, 0.0]),
        "max_logits": scaled.amax(1),
        "prefix": prefixes(logits, shift),
        "shift": shift,
    }


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


def everything(ops, logits, begin, end, arguments):
    """All results of some columns, those of the rows' whole maximum given."""
    part = logits[:, begin:end]
    temperature, cut, top = arguments["temperature"], arguments["cut"], logits.amax(1)
    prefix = torch.zeros(len(logits), dtype=torch.int64)
    rest = [arguments[name] for name in ("seeds", "positions", "sampled")]
    best, column = ops.gumbel_argmax(part, temperature, cut, *rest, begin)
    sums = [
        ops.row_mass(part, top)[:, None],
        ops.count_histogram(part, prefix, 24),
        ops.mass_histogram(part, temperature, cut, top / temperature, prefix, 24),
    ]
    return best, column + begin, torch.cat(sums, 1)


@pytest.mark.parametrize("border", [1, 6, 4099])
def test_results_do_not_depend_on_how_columns_are_spread(ops, border):
    arguments = gumbel_arguments(5003, first_token=0)
    logits = arguments["logits"]
    best, column, sums = everything(ops, logits, 0, 5003, arguments)
    parts = [everything(ops, logits, *ends, arguments) for ends in ((0, border), (border, 5003))]
    assert torch.equal(parts[0][2] + parts[1][2], sums)
    first_wins = parts[0][0] >= parts[1][0]
    assert torch.equal(torch.where(first_wins, parts[0][0], parts[1][0]), best)
    assert torch.equal(torch.where(first_wins, parts[0][1], parts[1][1]), column)


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
    assert [x.shape for x in ops.row_argmax(logits)] == [(0,), (0,)]
    assert ops.gumbel_argmax(logits, none, none, long, long, long.bool(), 0)[1].shape == (0,)
    assert ops.row_mass(logits, none).shape == (0,)
    assert ops.mass_histogram(logits, none, none, none, long, 0).shape == (0, 256)


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
    assert same(got, cpu_sampling.gumbel_argmax(*arguments.values(), first_token))
    masses = mass_arguments(1003, 8)
    logits, prefix = masses["logits"], masses["prefix"]
    assert same(sampling_ops.row_argmax(logits), cpu_sampling.row_argmax(logits))
    pairs = [
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
    "positions": [torch.ones(5, dtype=torch.int32)],
    "sampled": [torch.ones(5)],
    "first_token": [-1, (1 << 34) - 8],
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
        sampling_ops.row_argmax(torch.empty(2, 3, device="meta"))
    with pytest.raises(ValueError, match=r"^scores: expected"):
        sampling_ops.row_argmax(torch.zeros(3))

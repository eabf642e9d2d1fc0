"""Cases of the sampler's operations, for tests of each back end."""

import math

import pytest
import torch

from kvshard.kernels import sampling_reference

SEEDS = torch.tensor([0, -1, 0x123456789ABCDEF, -(1 << 63), 77])
PLACES = torch.tensor([0, 1, (3 << 32) + 1234, (1 << 63) - (1 << 31) + 5, (1 << 32) - 1])
MANY = 16389  # more than one thread's or program's share of a row
SHAPES = pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (3, 7), (2, 256), (5, 1003), (2, MANY)], ids=str
)


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


def gumbel_arguments(columns, first_token=6):
    """Five rows: sampled or not, with a cut or none."""
    return {
        "logits": random_logits(5, columns),
        "temperature": torch.tensor([1.0, 0.6, 1.7, 1.0, 0.9]),
        "cut": torch.tensor([-math.inf, -1.0, 2.0, -math.inf, 0.5]),
        "seeds": there(SEEDS),
        "places": there(PLACES),
        "sampled": torch.tensor([True, True, True, False, False]),
        "first_token": first_token,
    }


def prefixes(logits, shift):
    """The leading bits of a key of each row that others share; no row of more than two is left out but the third."""
    keys = in_reference("ordered_keys", logits)
    prefix = keys[:, len(keys[0]) // 2] >> (shift + 8)
    if len(prefix) > 2:
        prefix[2] = -1
    return there(prefix)


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


def everything(ops, logits, begin, end, arguments):
    """All results of some columns, those of the rows' whole maximum given."""
    part = logits[:, begin:end]
    temperature, cut, top = arguments["temperature"], arguments["cut"], logits.amax(1)
    prefix = torch.zeros(len(logits), dtype=torch.int64)
    rest = [arguments[name] for name in ("seeds", "places", "sampled")]
    packed = ops.gumbel_argmax(part, temperature, cut, *rest, begin)
    sums = [
        ops.row_mass(part, top)[:, None],
        ops.count_histogram(part, prefix, 24),
        ops.mass_histogram(part, temperature, cut, top / temperature, prefix, 24),
    ]
    return packed, torch.cat(sums, 1)

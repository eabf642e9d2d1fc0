"""What only the Triton kernels can get wrong: blocks of heads, codes made with integer operations, addresses past
2**31, and blocks before a window that a loop trip begins in the middle of."""

import pytest
import torch
from tolerances import assert_within

from kvshard.kernels import reference
from kvshard.kernels.cache import KVLayer

pytest.importorskip("triton")

QUANTISED = pytest.mark.parametrize("format", ["int8", "fp8", "int4"])


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def written(function, device, q, k, v, cache, **options):
    """q and cache after `function` at positions 0, 1, .. and slots 0, 1, .. of block 1."""
    count, head_dim = q.shape[0], q.shape[2]
    angles = torch.arange(count).unsqueeze(1) * 100.0 ** -torch.linspace(0, 1, head_dim // 2)
    positions = torch.arange(count)
    there, cache = q.to(device, copy=True), cache.clone().to(device)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).to(device)
    arguments = there, k.to(device), v.to(device), cos_sin, positions.to(device), cache
    function(*arguments, (positions + cache.block_size).to(device), **options)
    return there.cpu(), cache.to("cpu")


def zero_cache(format, num_kv_heads, block_size, head_dim):
    cache = KVLayer.empty(format, (2, num_kv_heads, block_size, head_dim), torch.float32, "cpu")
    for tensor in cache.tensors:
        tensor.zero_()
    return cache


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(("num_q", "num_kv"), [(7, 5), (3, 5), (40, 1)])
def test_heads_in_several_programs(device, num_q, num_kv, normed):
    """More KV heads than a program takes, query heads that do not divide by the programs, or all in one."""
    from kvshard.kernels.tiles import rotary_tile
    from kvshard.kernels.triton import rotary_kv_write

    assert rotary_tile(5, 128) == 4
    generator = torch.Generator().manual_seed(num_q)
    q, k, v = (torch.randn(3, heads, 128, generator=generator) for heads in (num_q, num_kv, num_kv))
    weights = [1 + torch.randn(128, generator=generator) / 4 for _ in range(2)] if normed else [None, None]
    results = []
    for function, where in ((rotary_kv_write, device), (reference.rotary_kv_write, "cpu")):
        q_norm, k_norm = (None if weight is None else weight.to(where) for weight in weights)
        options = {"q_norm": q_norm, "k_norm": k_norm, "eps": 1e-5}
        results.append(written(function, where, q, k, v, zero_cache("auto", num_kv, 16, 128), **options))
    (got, cache), (expected, wanted) = results
    assert_within(got, expected, "rotary")
    assert_within(cache.k, wanted.k, "rotary")
    assert torch.equal(cache.v, wanted.v)


def awkward_values(format):
    """Rows [n, 256] with the scale 1 exactly: every code, the middles between codes, and their neighbours."""
    codes = {
        "int8": torch.arange(-127.0, 128),
        "fp8": torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float(),
        "int4": torch.arange(-7.5, 8),
    }[format]
    middles = (codes[1:] + codes[:-1]) / 2
    signs = torch.tensor([1.0, -1.0]) if format == "fp8" else torch.ones(1)
    values = torch.cat([codes, middles, middles.nextafter(codes[1:]), middles.nextafter(codes[:-1])])
    values = (values * signs[:, None]).flatten()
    rows = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    largest = {"int8": 127.0, "fp8": 448.0, "int4": 7.5}[format]
    return torch.nn.functional.pad(rows, (0, 1), value=largest)


@QUANTISED
def test_codes_have_the_bits_of_the_definition(device, format):
    """Ties to even, subnormal numbers, both ends; then rows of all magnitudes, whose division must be exact."""
    from kvshard.kernels.triton import rotary_kv_write

    magnitudes = torch.logspace(-9, 8, 40)[:, None]
    random = torch.randn(40, 256, generator=torch.Generator().manual_seed(1)) * magnitudes
    rows = torch.cat([awkward_values(format), random])
    v = rows[:, None]
    q = torch.zeros(len(rows), 1, 256)
    cache = zero_cache(format, 1, len(rows), 256)
    _, got = written(rotary_kv_write, device, q, q, v, cache)
    _, expected = written(reference.rotary_kv_write, "cpu", q, q, v, cache)
    scales = expected.v_scale[1, 0]
    assert (scales[:-40].abs() == 1).all()
    assert (scales == 0).any()  # and one that underflows
    assert scales.isinf().any()  # and one that overflows
    assert torch.equal(got.v_scale, expected.v_scale)
    assert torch.equal(got.v.view(torch.uint8), expected.v.view(torch.uint8))


@pytest.mark.parametrize("format", ["auto", "int8", "fp8", "int4"])
@pytest.mark.parametrize("window", [15, 16, 17, 50])
def test_blocks_before_the_window_may_be_gone(device, attention_case, format, window):
    """A loop trip spans four blocks; those of it that no query sees have lost their table entries, here to NaN."""
    from kvshard.kernels.triton import paged_attention

    case = attention_case(
        (1, 3, 20), (200, 64, 130), q_per_kv=(2, 1), head_dim=24, window=window, format=format
    )
    expected = case.run_with_lse(reference.paged_attention)
    for row, (query_len, context_len) in enumerate(zip(case.query_lens, case.context_lens, strict=True)):
        case.block_tables[row, : max(context_len - query_len - window + 1, 0) // 16] = 0
    got = case.run_with_lse(paged_attention, device)
    assert_within(got[0], expected[0], "attention")
    assert_within(got[1], expected[1], "logsumexp of float32")


def test_a_cache_of_more_than_2_to_the_31(device, attention_case):
    """In the last blocks of a large cache, of which no other page is touched, rows have the bits they have in a small
    one. Keys and values lie in the same place, and no position turns them, so either may be written last."""
    from kvshard.kernels.triton import paged_attention, rotary_kv_write

    case = attention_case((1, 2), (20, 10), q_per_kv=(2,), head_dim=128)
    kv = torch.randn(30, 1, 128, generator=torch.Generator().manual_seed(2)).to(device)
    cos_sin = torch.tensor([1.0, 0.0], device=device).repeat_interleave(64)[None]
    position = torch.cat([torch.arange(20), torch.arange(10)])
    row = torch.tensor([0] * 20 + [1] * 10)
    results = []
    for num_blocks in (4, 2**20 + 4):
        codes = torch.empty(num_blocks, 1, 16, 128, dtype=torch.int8, device=device)
        scales = torch.empty(num_blocks, 1, 16, dtype=torch.float16, device=device)
        cache = KVLayer(codes, codes, scales, scales)
        tables = num_blocks - torch.tensor([[1, 3], [2, 4]], dtype=torch.int32)
        slots = tables[row, position // 16].long() * 16 + position % 16
        no_turn = torch.zeros(30, dtype=torch.int64, device=device)
        rotary_kv_write(kv.clone(), kv, kv, cos_sin, no_turn, cache, slots.to(device))
        large = case.changed(cache=cache, block_tables=tables)
        results.append(large.run_with_lse(paged_attention, device))
    assert codes.numel() > 2**31
    for small, large in zip(*results, strict=True):
        assert torch.equal(small, large)

"""QK norm, rotary and cache writes in one pass, of each back end, against the definition."""

import pytest
import torch
from tolerances import assert_within

from kvshard.kernels import ops, reference
from kvshard.kernels.cache import KVLayer

NUM_Q, NUM_KV = 3, 2
POSITIONS = [7, 0, 49, 3, 3]
SLOTS = [16, 17, 40, 63, 31]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"]
)
FORMATS = pytest.mark.parametrize("format", ["auto", "int8", "fp8", "int4"])


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(
    function,
    device="cpu",
    *,
    positions=POSITIONS,
    slots=SLOTS,
    format="auto",
    dtype=torch.float32,
    head_dim=24,
    rotary_dim=None,
    block_size=16,
    normed=False,
    eps=1e-5,
    qkv=None,
):
    """q afterwards, and the cache, whose other rows are zero. q, k and v are views of one tensor."""
    qkv = rand(5, NUM_Q + 2 * NUM_KV, head_dim, dtype=dtype) if qkv is None else qkv
    there = qkv.to(device, copy=True)
    q, k, v = there.split([NUM_Q, NUM_KV, NUM_KV], dim=1)
    angles = torch.arange(50).unsqueeze(1) * 100.0 ** -torch.linspace(0, 1, (rotary_dim or head_dim) // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).to(device)
    cache = KVLayer.empty(format, (4, NUM_KV, block_size, head_dim), dtype, device)
    for tensor in cache.tensors:
        tensor.zero_()
    norms = [rand(head_dim, dtype=dtype, seed=seed).to(device) if normed else None for seed in (1, 2)]
    function(
        q,
        k,
        v,
        cos_sin,
        torch.tensor(positions, device=device),
        cache,
        torch.tensor(slots, device=device),
        q_norm=norms[0],
        k_norm=norms[1],
        eps=eps,
    )
    torch.testing.assert_close(there[:, NUM_Q:].cpu(), qkv[:, NUM_Q:], rtol=0, atol=0, equal_nan=True)
    return q.cpu(), cache.to("cpu")


def check(got, expected):
    """q and, with `auto`, keys within the tolerance; quantised rows within one code of the definition's."""
    assert_within(got[0].contiguous(), expected[0].contiguous(), "rotary")
    cache, wanted = got[1], expected[1]
    if cache.k_scale is None:
        assert_within(cache.k, wanted.k, "rotary")
        assert torch.equal(cache.v, wanted.v)
        return
    # Values are stored as they come, so their codes must be the very same; keys were turned in float32 first.
    assert torch.equal(cache.v.view(torch.uint8), wanted.v.view(torch.uint8))
    assert torch.equal(cache.v_scale, wanted.v_scale)
    assert_within(cache.k_scale, wanted.k_scale, "scale")
    difference = reference.dequantised(cache.k, cache.k_scale) - reference.dequantised(
        wanted.k, wanted.k_scale
    )
    step = wanted.k_scale.double().abs()[..., None] * (32 if cache.format == "fp8" else 1)
    assert (difference.abs() <= 1.01 * step).all()
    changed = (cache.k.view(torch.uint8) != wanted.k.view(torch.uint8)).float().mean()
    assert changed < 0.01, f"{changed:.1%} of the keys' codes differ"


@DTYPES
@FORMATS
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_matches_reference(backend, format, dtype, normed):
    options = {"format": format, "dtype": dtype, "normed": normed}
    check(
        run(backend.ops.rotary_kv_write, backend.device, **options), run(reference.rotary_kv_write, **options)
    )


@FORMATS
@pytest.mark.parametrize(
    "options",
    [
        {"head_dim": 64},
        {"head_dim": 80, "rotary_dim": 20},
        {"head_dim": 96, "block_size": 24, "slots": [24, 25, 95, 47, 48]},
        {"head_dim": 128, "slots": [16, -1, 40, 63, -1]},
        {"head_dim": 256, "slots": [-1, -1, -1, -1, -1]},
    ],
    ids=["64", "80, 20 of them turn", "96, blocks of 24", "128, some skipped", "256, all skipped"],
)
def test_shapes(backend, format, options):
    options = {"format": format, **options}
    check(
        run(backend.ops.rotary_kv_write, backend.device, **options), run(reference.rotary_kv_write, **options)
    )


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_zeros_large_and_broken_values(backend, format):
    """Zeros stay zeros, a row with a NaN or infinity reads as NaN, its neighbours are as they were."""
    qkv = rand(5, NUM_Q + 2 * NUM_KV, 24)
    values = qkv[:, NUM_Q + NUM_KV :]
    values[0, 0] = 0
    values[1, 0] *= 1e4
    values[2, 1, 3] = float("nan")
    values[3, 0, 5] = float("-inf")
    values[4, 1] *= 1e-5
    got = run(backend.ops.rotary_kv_write, backend.device, format=format, qkv=qkv.clone())[1]
    expected = run(reference.rotary_kv_write, format=format, qkv=qkv)[1]
    got, expected = (reference.dequantised(cache.v, cache.v_scale) for cache in (got, expected))
    assert expected.isnan().sum() == 2 * 24
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=0, atol=0)


MUTATIONS = {
    "position": {"positions": [7, 1, 49, 3, 3]},
    "slot": {"slots": [16, 18, 40, 63, 31]},
    "skipped": {"slots": [16, -1, 40, 63, 31]},
    "norm": {"normed": False},
    "eps": {"eps": 1e-1},
    "rotary_dim": {"rotary_dim": 12},
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS.keys())
@pytest.mark.parametrize("format", ["auto", "int8"])
def test_wrong_input_fails(backend, format, mutation):
    options = {"format": format, "normed": True}
    expected = run(reference.rotary_kv_write, **options)
    check(run(backend.ops.rotary_kv_write, backend.device, **options), expected)
    with pytest.raises(AssertionError):
        check(run(backend.ops.rotary_kv_write, backend.device, **(options | mutation)), expected)


def test_cpu_has_the_bits_of_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, v = rand(5, NUM_Q + 2 * NUM_KV, 64).split([NUM_Q, NUM_KV, NUM_KV], dim=1)
    angles = torch.arange(50).unsqueeze(1) * 100.0 ** -torch.linspace(0, 1, 32)
    cos_sin, positions = torch.cat([angles.cos(), angles.sin()], dim=1), torch.tensor(POSITIONS)
    cos, sin = (torch.cat([half, half], dim=1)[positions] for half in cos_sin.chunk(2, dim=1))
    theirs = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    cache = KVLayer.empty("auto", (1, NUM_KV, 16, 64), torch.float32, "cpu")
    ops.rotary_kv_write(q, k, v, cos_sin, positions, cache, torch.arange(5))
    assert torch.equal(q, theirs[0][0].transpose(0, 1))
    assert torch.equal(cache.k[0, :, :5], theirs[1][0])

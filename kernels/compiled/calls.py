"""Calls of every Triton operation as a model makes them: what `worker` compiles the kernels from.

Only the shapes, strides, dtypes and alignments of the arguments count; nothing is computed. Every row of `tiles` and
every kernel that a module of `kernels.triton` launches is reached by one of these calls.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..cache import CacheFormat, KVLayer
from ..metadata import AttentionMetadata, HeadLayout
from ..peers import PeerBuffers
from ..triton import sampling
from ..triton.activation import gelu_mul, silu_mul
from ..triton.attention import paged_attention
from ..triton.linear import quantised_linear
from ..triton.norm import add_rms_norm, rms_norm
from ..triton.peer_all_reduce import all_reduce_add_rms_norm
from ..triton.rotary_kv_write import rotary_kv_write
from ..weight_codes import WeightCodes

FORMATS: tuple[CacheFormat, ...] = ("auto", "int8", "fp8", "int4")


@dataclass(frozen=True)
class TypicalCall:
    """A named call. `narrow`: those of its kernels that read no rows, so that 16-byte loads are not expected."""

    name: str
    run: Callable[[], object]
    narrow: tuple[str, ...] = ()


def bf16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def typical_calls() -> Iterator[TypicalCall]:
    yield from norm_calls()
    yield from all_reduce_calls()
    yield TypicalCall("silu_mul 14336", partial(silu_mul, bf16(8, 2 * 14336)))
    yield TypicalCall("gelu_mul 9216", partial(gelu_mul, bf16(8, 2 * 9216)))
    yield from quantised_linear_calls()
    yield from cache_write_calls()
    for format in FORMATS:
        for head_dim in (64, 128, 256):
            yield from attention_calls(head_dim, format)
    yield from attention_calls(80, "auto")
    yield from sampling_calls()


def norm_calls() -> Iterator[TypicalCall]:
    for hidden in (576, 8192):
        x, weight = bf16(8, hidden), bf16(hidden)
        yield TypicalCall(f"rms_norm {hidden}", partial(rms_norm, x, weight, 1e-5))
        yield TypicalCall(f"add_rms_norm {hidden}", partial(add_rms_norm, x, x.clone(), weight, 1e-5))


def all_reduce_calls() -> Iterator[TypicalCall]:
    for world_size, hidden in ((2, 4096), (8, 8192)):
        data = [bf16(2, 64, hidden) for _ in range(world_size)]
        signals = [torch.zeros(64, world_size, dtype=torch.int64) for _ in range(world_size)]
        peers = PeerBuffers.build(0, data, signals, num_programs=64)
        x, weight = bf16(8, hidden), bf16(hidden)
        yield TypicalCall(
            f"all_reduce_add_rms_norm {world_size} x {hidden}",
            partial(all_reduce_add_rms_norm, x, x.clone(), weight, 1e-5, peers),
        )


def quantised_linear_calls() -> Iterator[TypicalCall]:
    """A decode step and a prefill; symmetric codes of 8 and 4 bits, and those of 4 with minima."""
    rows, width = 6144, 4096
    scales = torch.empty(rows, width // 32, dtype=torch.float16)
    octets, halves = (
        torch.empty(rows, width, dtype=torch.int8),
        torch.empty(rows, width // 2, dtype=torch.uint8),
    )
    for name, codes, minima in (
        ("int8", octets, None),
        ("int4", halves, None),
        ("int4 minima", halves, scales),
    ):
        weight = WeightCodes(codes, scales, minima, torch.bfloat16)
        for tokens in (8, 512):
            run = partial(quantised_linear, bf16(tokens, width), weight, None, torch.bfloat16)
            yield TypicalCall(f"quantised_linear {name} x {tokens}", run)


def cache_of(format: CacheFormat, head_dim: int) -> KVLayer:
    return KVLayer.empty(format, (512, 8, 16, head_dim), torch.bfloat16, "cpu")


def cache_write_calls() -> Iterator[TypicalCall]:
    index = torch.zeros(8, dtype=torch.int64)
    for head_dim, formats in ((64, FORMATS), (128, ("auto", "int4"))):
        q, k, v = bf16(8, 48, head_dim).split([32, 8, 8], dim=1)
        norm = bf16(head_dim) if head_dim == 128 else None
        for format in formats:
            cache, angles = cache_of(format, head_dim), torch.empty(8192, head_dim)
            run = partial(rotary_kv_write, q, k, v, angles, index, cache, index, norm, norm, 1e-5)
            yield TypicalCall(f"rotary_kv_write {format} {head_dim}", run)


def attention_calls(head_dim: int, format: CacheFormat) -> Iterator[TypicalCall]:
    """Decode over several chunks, which are combined then, and prefill; what is None is compiled away."""
    cache = cache_of(format, head_dim)
    sinks = torch.empty(32)
    for name, query_len, window, soft_cap in (("decode", 1, None, None), ("prefill", 64, 1024, 50.0)):
        num_tokens = 2 * query_len
        q = bf16(num_tokens, 48, head_dim)[:, :32]
        meta = AttentionMetadata.build(
            np.full(2, query_len, np.int32),
            np.full(2, 4000, np.int32),
            torch.zeros(2, 256, dtype=torch.int32),
            block_size=16,
            device="cpu",
        )
        heads = HeadLayout((4,) * 8)
        extras = (sinks, torch.empty(num_tokens, 32)) if window else (None, None)
        run = partial(paged_attention, q, cache, meta, heads, head_dim**-0.5, window, soft_cap, *extras)
        yield TypicalCall(f"attention {name} {format} {head_dim}", run)


def sampling_calls() -> Iterator[TypicalCall]:
    rows, columns = 8, 49152
    logits, floats = torch.empty(rows, columns), torch.ones(rows)
    longs, flags = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.bool)
    keys = torch.zeros(rows, dtype=torch.int32)
    yield TypicalCall("row_argmax", partial(sampling.row_argmax, logits, 0))
    gumbel = partial(sampling.gumbel_argmax, logits, floats, floats, longs, longs, flags, 0)
    yield TypicalCall("gumbel_argmax", gumbel, ("argmax_kernel",))
    for ranks in (1, 4):
        best = partial(sampling.best_of_ranks, torch.zeros(ranks, rows, dtype=torch.int64))
        yield TypicalCall(f"best_of_ranks {ranks}", best, ("best_kernel",))
    yield TypicalCall("row_mass", partial(sampling.row_mass, logits, floats))
    yield TypicalCall("count_histogram", partial(sampling.count_histogram, logits, keys, 24))
    masses = partial(sampling.mass_histogram, logits, floats, floats, floats, keys, 24)
    yield TypicalCall("mass_histogram", masses)
    yield TypicalCall("philox", partial(sampling.philox, longs, longs, 0, columns), ("philox_kernel",))
    bits = torch.zeros(4096, dtype=torch.int32)
    yield TypicalCall("gumbel", partial(sampling.gumbel, bits), ("gumbel_kernel",))

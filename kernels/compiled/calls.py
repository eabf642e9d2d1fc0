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

from ..metadata import AttentionMetadata, HeadLayout
from ..peers import PeerBuffers
from ..triton.activation import silu_mul
from ..triton.attention import paged_attention
from ..triton.kv_write import kv_write
from ..triton.norm import add_rms_norm, rms_norm
from ..triton.peer_all_reduce import all_reduce_add_rms_norm
from ..triton.rotary import rotary


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
    yield from cache_write_calls()
    for head_dim in (64, 80, 128, 256):
        yield from attention_calls(head_dim)


def norm_calls() -> Iterator[TypicalCall]:
    for hidden in (576, 4096, 8192):
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


def cache_write_calls() -> Iterator[TypicalCall]:
    q, k, v = bf16(8, 48, 128).split([32, 8, 8], dim=1)
    cache, index = bf16(64, 8, 16, 128), torch.zeros(8, dtype=torch.int64)
    yield TypicalCall("rotary 128", partial(rotary, q, k, torch.empty(8192, 128), index))
    yield TypicalCall("kv_write 128", partial(kv_write, k, v, cache, cache.clone(), index))


def attention_calls(head_dim: int) -> Iterator[TypicalCall]:
    """Decode over several chunks, which are combined then, and prefill; the window is an argument that is compiled in."""
    cache = bf16(512, 8, 16, head_dim)
    for name, query_len, window in (
        ("decode", 1, None),
        ("prefill", 64, None),
        ("windowed prefill", 64, 1024),
    ):
        q = bf16(2 * query_len, 48, head_dim)[:, :32]
        meta = AttentionMetadata.build(
            np.full(2, query_len, np.int32),
            np.full(2, 4000, np.int32),
            torch.zeros(2, 256, dtype=torch.int32),
            block_size=16,
            device="cpu",
        )
        heads = HeadLayout((4,) * 8)
        run = partial(paged_attention, q, cache, cache, meta, heads, head_dim**-0.5, window)
        yield TypicalCall(f"attention {name} {head_dim}", run)

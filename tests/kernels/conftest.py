"""Back ends under test and the cases they share. Without a CUDA device the Triton kernels run interpreted."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from kvshard.kernels.metadata import AttentionMetadata, HeadLayout


@dataclass
class Backend:
    """A back end's functions and the device its tensors live on."""

    name: str
    ops: ModuleType
    device: str


@dataclass
class AttentionCase:
    """Arguments of paged_attention; `changed` gives a copy with other lengths or block tables."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: torch.Tensor
    heads: HeadLayout
    scale: float
    window: int | None = None

    def changed(self, **changes: Any) -> "AttentionCase":
        return replace(self, **changes)

    def run(self, function: Callable[..., torch.Tensor], device: str = "cpu", **options: Any) -> torch.Tensor:
        """`function` on these arguments, result on CPU."""
        meta = AttentionMetadata.build(
            np.array(self.query_lens, dtype=np.int32),
            np.array(self.context_lens, dtype=np.int32),
            self.block_tables.to(device),
            self.k_cache.shape[2],
            device,
        )
        q, k_cache, v_cache = (x.to(device) for x in (self.q, self.k_cache, self.v_cache))
        out = function(q, k_cache, v_cache, meta, self.heads, self.scale, window=self.window, **options)
        return out.cpu()

    def alone(self, row: int) -> "AttentionCase":
        """The case of one of its rows, over the same cache."""
        begin = sum(self.query_lens[:row])
        return self.changed(
            q=self.q[begin : begin + self.query_lens[row]],
            query_lens=self.query_lens[row : row + 1],
            context_lens=self.context_lens[row : row + 1],
            block_tables=self.block_tables[row : row + 1],
        )


def attention_case(
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    q_per_kv: tuple[int, ...] = (3,),
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    seed: int = 0,
) -> AttentionCase:
    """Random queries and cache, shuffled blocks, NaN in every slot that holds no token; q is a view of a wider tensor."""
    generator = torch.Generator().manual_seed(seed)
    heads = HeadLayout(q_per_kv)
    counts = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(counts) + 3
    shape = (num_blocks, heads.num_kv_heads, block_size, head_dim)
    k_cache = torch.full(shape, float("nan"), dtype=dtype)
    v_cache = torch.full(shape, float("nan"), dtype=dtype)
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()  # block 0 is never a row's
    block_tables = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int32)
    for row, (count, length) in enumerate(zip(counts, context_lens, strict=True)):
        blocks = [free.pop() for _ in range(count)]
        block_tables[row, :count] = torch.tensor(blocks, dtype=torch.int32)
        for cache in (k_cache, v_cache):
            for place, block in enumerate(blocks):
                used = min(block_size, length - place * block_size)
                cache[block, :, :used] = torch.randn(heads.num_kv_heads, used, head_dim, generator=generator)
    num_tokens = sum(query_lens)
    qkv = torch.randn(num_tokens, heads.num_q_heads + 2, head_dim, generator=generator).to(dtype)
    return AttentionCase(
        q=qkv[:, : heads.num_q_heads],
        k_cache=k_cache,
        v_cache=v_cache,
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=block_tables,
        heads=heads,
        scale=head_dim**-0.5,
        window=window,
    )


@pytest.fixture(name="attention_case")
def _attention_case() -> Callable[..., AttentionCase]:
    return attention_case


@pytest.fixture(params=["cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each back end that can run here, called behind the door so that Triton can be interpreted on CPU."""
    if request.param == "cpu":
        from kvshard.kernels import cpu

        return Backend("cpu", cpu, "cpu")
    pytest.importorskip("triton")
    from kvshard.kernels import triton

    return Backend("triton", triton, "cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""Back ends under test and the cases they share. Without a CUDA device the Triton kernels run interpreted."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import sampling_cases
import torch

from kvshard.kernels import reference
from kvshard.kernels.cache import CacheFormat, KVLayer
from kvshard.kernels.cpu import linear as cpu_linear
from kvshard.kernels.metadata import AttentionMetadata, HeadLayout

from .processors import OTHER_PROCESSORS, load_for


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
    cache: KVLayer
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: torch.Tensor
    heads: HeadLayout
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None

    def changed(self, **changes: Any) -> "AttentionCase":
        return replace(self, **changes)

    def run(self, function: Callable[..., torch.Tensor], device: str = "cpu", **options: Any) -> torch.Tensor:
        """`function` on these arguments, result on CPU."""
        return self.run_with_lse(function, device, **options)[0]

    def run_with_lse(
        self, function: Callable[..., torch.Tensor], device: str = "cpu", **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        meta = AttentionMetadata.build(
            np.array(self.query_lens, dtype=np.int32),
            np.array(self.context_lens, dtype=np.int32),
            self.block_tables.to(device),
            self.cache.block_size,
            device,
        )
        lse = torch.full(self.q.shape[:2], float("nan"), device=device)
        out = function(
            self.q.to(device),
            self.cache.to(device),
            meta,
            self.heads,
            self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
            sinks=None if self.sinks is None else self.sinks.to(device),
            lse=lse,
            **options,
        )
        return out.cpu(), lse.cpu()

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
    soft_cap: float | None = None,
    with_sinks: bool = False,
    format: CacheFormat = "auto",
    seed: int = 0,
) -> AttentionCase:
    """Random queries and cache, shuffled blocks, NaN in every slot that holds no token; q is a view of a wider tensor."""
    generator = torch.Generator().manual_seed(seed)
    heads = HeadLayout(q_per_kv)
    counts = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(counts) + 3
    cache = KVLayer.empty(format, (num_blocks, heads.num_kv_heads, block_size, head_dim), dtype, "cpu")
    cache.fill_(float("nan"))
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()  # block 0 is never a row's
    block_tables = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int32)
    for row, (count, length) in enumerate(zip(counts, context_lens, strict=True)):
        blocks = [free.pop() for _ in range(count)]
        block_tables[row, :count] = torch.tensor(blocks, dtype=torch.int32)
        kv = torch.randn(2, length, heads.num_kv_heads, head_dim, generator=generator)
        for position in range(length):
            place = blocks[position // block_size], position % block_size
            reference.store(cache, *place, kv[0, position], kv[1, position])
    num_tokens = sum(query_lens)
    qkv = torch.randn(num_tokens, heads.num_q_heads + 2, head_dim, generator=generator).to(dtype)
    return AttentionCase(
        q=qkv[:, : heads.num_q_heads],
        cache=cache,
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=block_tables,
        heads=heads,
        scale=head_dim**-0.5,
        window=window,
        soft_cap=soft_cap,
        sinks=torch.randn(heads.num_q_heads, generator=generator) if with_sinks else None,
    )


@pytest.fixture(name="attention_case")
def _attention_case() -> Callable[..., AttentionCase]:
    return attention_case


@pytest.fixture(params=["cpu", "torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Each back end that can run here, called behind the door so that Triton can be interpreted on CPU.

    cpu is the compiled one, torch what takes its place without a compiler.
    """
    if request.param in ("cpu", "torch"):
        from kvshard.kernels import cpu

        if request.param == "torch":
            monkeypatch.setattr("kvshard.kernels.cpu.attention.load", lambda *_: None)
            monkeypatch.setattr("kvshard.kernels.cpu.pointwise.load", lambda *_: None)
        return Backend(request.param, cpu, "cpu")
    pytest.importorskip("triton")
    from kvshard.kernels import triton

    return Backend("triton", triton, "cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["c", "torch", "triton"])
def ops(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Each back end of the sampler's operations that can run here, called behind the door; tensors are made for it."""
    if request.param == "triton":
        pytest.importorskip("triton")
        from kvshard.kernels.triton import sampling
    elif request.param == "torch":
        from kvshard.kernels.cpu import sampling_torch as sampling
    else:
        from kvshard.kernels.cpu import sampling

        if sampling._library() is None:
            pytest.skip("no compiler here")
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        yield sampling


@pytest.fixture
def size(ops: ModuleType) -> Callable[[int], int]:
    """Columns of a case: Triton's programs have smaller shares, and the interpreter is slow."""
    return lambda columns: (
        4101 if columns == sampling_cases.MANY and ops.__name__.endswith("triton.sampling") else columns
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", *OTHER_PROCESSORS])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Products in C as for this processor and for others, whose vectors are of 16, 8 and 4 numbers."""
    if request.param != "native":
        library = load_for(request.param, lambda: cpu_linear._library(request.param))
        monkeypatch.setattr(cpu_linear, "_library", lambda: library)
    return str(request.param)

"""Calls whose kernels each have one fault, for test_compile.py."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvshard.kernels.compiled.calls import TypicalCall, bf16, cache_of
from kvshard.kernels.metadata import AttentionMetadata, HeadLayout
from kvshard.kernels.tiles import attention_tiles
from kvshard.kernels.triton.attention import paged_attention


@triton.jit
def product_kernel(
    a_ptr, b_ptr, out_ptr, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):  # type: ignore[no-untyped-def]
    row, column, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for step in range(steps):
        a = tl.load(a_ptr + row[:, None] * steps * K + step * K + inner[None, :])
        b = tl.load(b_ptr + (step * K + inner[:, None]) * N + column[None, :])
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(out_ptr + row[:, None] * N + column[None, :], total)


@triton.jit
def every_third_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.arange(0, BLOCK)
    tl.store(out_ptr + column, tl.load(x_ptr + 3 * column))


@triton.jit
def broken_kernel(x_ptr):  # type: ignore[no-untyped-def]
    tl.static_assert(False, "this kernel never compiles")


def attention_on_one_warp() -> None:
    tiles = attention_tiles(256, "auto", 2)
    tiles = replace(tiles, prefill=replace(tiles.prefill, num_warps=1))
    meta = AttentionMetadata.build(
        np.array([64]), np.array([4000]), torch.zeros(1, 256, dtype=torch.int32), 16, "cpu"
    )
    cache = cache_of("auto", 256)
    paged_attention(bf16(64, 32, 256), cache, meta, HeadLayout((4,) * 8), 1.0, tiles=tiles)


def product(dtype: torch.dtype, size: int, precision: str, **options: Any) -> None:
    a, b, out = (
        torch.empty(size, 1024, dtype=dtype),
        torch.empty(1024, size, dtype=dtype),
        torch.empty(size, size),
    )
    product_kernel[(1,)](a, b, out, 8, M=size, N=size, K=128, PRECISION=precision, **options)


def typical_calls() -> Iterator[TypicalCall]:
    yield TypicalCall("well-made", lambda: product(torch.bfloat16, 32, "ieee", num_stages=2))
    yield TypicalCall("tile", attention_on_one_warp)
    yield TypicalCall("stages", lambda: product(torch.bfloat16, 128, "ieee", num_warps=8, num_stages=5))
    yield TypicalCall("scalar", lambda: product(torch.float32, 16, "ieee", num_stages=1))
    yield TypicalCall("loads", lambda: every_third_kernel[(1,)](bf16(4096), bf16(1024), BLOCK=1024))
    narrow = ("every_third_kernel",)
    yield TypicalCall("allowed", lambda: every_third_kernel[(1,)](bf16(4096), bf16(512), BLOCK=512), narrow)
    yield TypicalCall("broken", lambda: broken_kernel[(1,)](bf16(16)))

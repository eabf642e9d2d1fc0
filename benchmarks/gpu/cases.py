"""Attention over a filled paged cache: inputs, expected results, and the peers that read the same keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import NotHereError, Run, check
from torch import Tensor

from kvshard.kernels import ops

# Largest relative errors against float32 attention over the unquantised keys: normal keys and values leave int4 steps
# of a third of their deviation, and int8 ones of a fiftieth.
BOUNDS: dict[ops.CacheFormat, float] = {"auto": 0.01, "int8": 0.02, "fp8": 0.06, "int4": 0.25}

_CHECKED_TOKENS = 128


@dataclass(frozen=True)
class Shape:
    """Rows of a step, and heads. query_lens: 1 for decode rows."""

    context_lens: tuple[int, ...]
    query_lens: tuple[int, ...]
    num_q: int
    num_kv: int
    head_dim: int
    block_size: int

    @classmethod
    def decode(cls, lens: tuple[int, ...], num_q: int, num_kv: int, head_dim: int, block_size: int) -> Shape:
        return cls(lens, (1,) * len(lens), num_q, num_kv, head_dim, block_size)

    @property
    def heads(self) -> str:
        return f"{self.num_q}/{self.num_kv} heads x {self.head_dim}, block {self.block_size}"

    def bytes_moved(self, format: ops.CacheFormat) -> float:
        """Keys and values read once, queries read, outputs written."""
        width = {"auto": 2.0 * self.head_dim, "int4": self.head_dim / 2 + 2}.get(format, self.head_dim + 2.0)
        rows = 2 * sum(self.context_lens) * self.num_kv
        return rows * width + 2 * sum(self.query_lens) * self.num_q * self.head_dim * 2

    def operations(self) -> float:
        """Of both products, for the pairs of query and key that causality leaves."""
        pairs = sum(
            q * (c - q) + q * (q + 1) / 2 for q, c in zip(self.query_lens, self.context_lens, strict=True)
        )
        return 4.0 * pairs * self.num_q * self.head_dim


def zipf_lengths(rows: int, total: int) -> tuple[int, ...]:
    """Lengths in proportion to 1, 1/2, 1/3, ... that add up to `total`, in an order without pattern."""
    weights = 1 / np.arange(1, rows + 1)
    lengths = np.maximum((weights * total / weights.sum()).astype(int), 1)
    lengths[0] += total - lengths.sum()
    return tuple(int(x) for x in np.random.default_rng(0).permutation(lengths))


class Filled:
    """A shape with random queries, keys and values in `num_layers` caches of each format.

    keys, values   of each layer: [sum of context_lens, num_kv, head_dim], row after row
    """

    def __init__(self, shape: Shape, device: torch.device, num_layers: int) -> None:
        self.shape = shape
        self.device = device
        total = sum(shape.context_lens)
        size = (total, shape.num_kv, shape.head_dim)
        self.keys, self.values = ([_normal(size, device) for _ in range(num_layers)] for _ in "kv")
        self.q = _normal((sum(shape.query_lens), shape.num_q, shape.head_dim), device)
        counts = [-(-n // shape.block_size) for n in shape.context_lens]
        self.num_blocks = sum(counts) + 1
        self.blocks = (
            torch.randperm(self.num_blocks - 1).add_(1).int().to(device)
        )  # row after row, without padding
        self.counts = counts
        tables = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=device)
        for row, blocks in enumerate(self.blocks.split(counts)):
            tables[row, : len(blocks)] = blocks
        lens = (np.array(x, np.int32) for x in (shape.query_lens, shape.context_lens))
        self.meta = ops.AttentionMetadata.build(*lens, tables, shape.block_size, device)
        self.heads = ops.HeadLayout((shape.num_q // shape.num_kv,) * shape.num_kv)
        self.scale = shape.head_dim**-0.5
        self._layers: dict[ops.CacheFormat, list[ops.KVLayer]] = {}

    def layers(self, format: ops.CacheFormat) -> list[ops.KVLayer]:
        """The caches of one format, the same ones for all who ask."""
        if format not in self._layers:
            self._layers[format] = self._written(format)
        return self._layers[format]

    def _written(self, format: ops.CacheFormat) -> list[ops.KVLayer]:
        """Written by the op that a model writes them with."""
        shape = self.shape
        position = torch.cat([torch.arange(n, device=self.device) for n in shape.context_lens])
        lens = torch.tensor(shape.context_lens, device=self.device)
        row = torch.repeat_interleave(torch.arange(len(lens), device=self.device), lens)
        block = self.meta.block_tables[row, position // shape.block_size].long()
        slots = block * shape.block_size + position % shape.block_size
        caches = []
        for k, v in zip(self.keys, self.values, strict=True):
            size = (self.num_blocks, shape.num_kv, shape.block_size, shape.head_dim)
            caches.append(ops.KVLayer.empty(format, size, k.dtype, self.device))
            # One query head that is of no use: keys and values are what is written.
            self._write(k[:, :1].clone(), k, v, caches[-1], slots)
        return caches

    def _write(self, q: Tensor, k: Tensor, v: Tensor, cache: ops.KVLayer, slots: Tensor) -> None:
        """Every token at position 0, where rotary turns nothing."""
        no_turn = torch.zeros(1, self.shape.head_dim, device=self.device)
        no_turn[:, : self.shape.head_dim // 2] = 1
        ops.rotary_kv_write(q, k, v, no_turn, torch.zeros_like(slots), cache, slots)

    def queries(self, format: ops.CacheFormat) -> Tensor:
        """The queries as keys of this format want them: the op that writes int4 keys mixes both."""
        q = self.q.clone()
        nowhere = torch.full((len(q),), -1, device=self.device)
        self._write(q, self.keys[0][: len(q)], self.values[0][: len(q)], self.layers(format)[0], nowhere)
        return q

    @cached_property
    def expected(self) -> list[tuple[Tensor, Tensor]]:
        """Some query tokens of the first and the last row, and attention in float32 over the first layer's keys."""
        starts = np.cumsum((0, *self.shape.context_lens))
        tokens = np.cumsum((0, *self.shape.query_lens))
        out = []
        for row in {0, len(self.counts) - 1}:
            new, length = self.shape.query_lens[row], self.shape.context_lens[row]
            picked = torch.linspace(0, new - 1, min(new, _CHECKED_TOKENS)).long().to(self.device)
            keys, values = (
                x[0][starts[row] : starts[row + 1]].float().transpose(0, 1) for x in (self.keys, self.values)
            )
            q = self.q[tokens[row] + picked].float().transpose(0, 1)
            places = torch.arange(length, device=self.device)
            attended = F.scaled_dot_product_attention(
                q, keys, values, attn_mask=places <= length - new + picked[:, None], enable_gqa=True
            )
            out.append((tokens[row] + picked, attended.transpose(0, 1)))
        return out

    def check(self, out: Tensor, bound: float) -> None:
        for tokens, expected in self.expected:
            check(out.reshape(self.q.shape)[tokens], expected, bound)

    def ours(self, format: ops.CacheFormat = "auto") -> Callable[[], Run]:
        """kvshard's attention."""

        def make() -> Run:
            layers, q = self.layers(format), self.queries(format)

            def run(i: int) -> Tensor:
                return ops.paged_attention(q, layers[i % len(layers)], self.meta, self.heads, self.scale)

            self.check(run(0), BOUNDS[format])
            return run

        return make


def _normal(size: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(size, device=device, dtype=torch.bfloat16)


def import_flashinfer() -> Any:
    try:
        import flashinfer
    except ImportError as error:
        raise NotHereError("FlashInfer is not installed") from error
    return flashinfer

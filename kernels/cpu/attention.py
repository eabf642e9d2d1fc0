"""Paged attention on CPU, in C (attention.c), or in torch where there is no compiler."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..cache import KVLayer
from ..metadata import AttentionMetadata, HeadLayout
from .library import FORMAT_CODES, load
from .tape import call, empty, no_memory
from .torch_ops import paged_attention as torch_attention

MAX_HEAD_DIM = 256


class _Arguments(ctypes.Structure):
    """struct attention"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_scale", "v_scale", "out", "lse", "sinks")),
        *((name, ctypes.c_void_p) for name in ("query_start", "context_lens", "block_tables", "first_head")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_q_heads", "num_kv_heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("block_size", "table_stride", "q_stride", "q_head_stride")),
        *(
            (name, ctypes.c_int64)
            for name in ("lse_stride", "q_format", "cache_format", "window", "num_threads")
        ),
        *((name, ctypes.c_double) for name in ("scale", "soft_cap")),
        *((name, ctypes.c_int64) for name in ("tiles", "vectors")),
    )


def paged_attention(
    q: Tensor,
    cache: KVLayer,
    meta: AttentionMetadata,
    heads: HeadLayout,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """See `ops.paged_attention`."""
    library = load("attention.c")
    if library is None or q.dtype not in FORMAT_CODES or q.shape[2] > MAX_HEAD_DIM:
        return torch_attention(q, cache, meta, heads, scale, window, soft_cap, sinks, lse)
    plan, _ = meta.prepare(
        ("cpu", heads, scale, window, soft_cap), lambda: _plan(meta, heads, scale, window, soft_cap)
    )
    arguments = _Arguments.from_buffer_copy(plan)
    out = empty(tuple(q.shape), q.dtype)
    arguments.q, arguments.out = q.data_ptr(), out.data_ptr()
    arguments.k, arguments.v = cache.k.data_ptr(), cache.v.data_ptr()
    arguments.k_scale = None if cache.k_scale is None else cache.k_scale.data_ptr()
    arguments.v_scale = None if cache.v_scale is None else cache.v_scale.data_ptr()
    arguments.sinks = None if sinks is None else sinks.data_ptr()
    arguments.lse, arguments.lse_stride = (None, 0) if lse is None else (lse.data_ptr(), lse.stride(0))
    arguments.q_stride, arguments.q_head_stride, arguments.head_dim = q.stride(0), q.stride(1), q.shape[2]
    arguments.q_format = FORMAT_CODES[q.dtype]
    arguments.cache_format = FORMAT_CODES[cache.k.dtype]
    arguments.num_threads = torch.get_num_threads()
    call(library.paged_attention, arguments, no_memory)
    return out


def _plan(
    meta: AttentionMetadata, heads: HeadLayout, scale: float, window: int | None, soft_cap: float | None
) -> tuple[_Arguments, object]:
    """What all layers of a step have in common, and what must live as long."""
    ends = [sum(heads.q_per_kv[:i]) for i in range(heads.num_kv_heads + 1)]
    first_head = (ctypes.c_int32 * len(ends))(*ends)
    arguments = _Arguments(
        query_start=meta.query_start.data_ptr(),
        context_lens=meta.context_lens.data_ptr(),
        block_tables=meta.block_tables.data_ptr(),
        first_head=ctypes.addressof(first_head),
        num_rows=len(meta.query_lens_host),
        num_q_heads=heads.num_q_heads,
        num_kv_heads=heads.num_kv_heads,
        block_size=meta.block_size,
        table_stride=meta.block_tables.stride(0),
        window=window or 0,
        scale=scale,
        soft_cap=soft_cap or 0.0,
    )
    return arguments, first_head  # the rest lives in `meta`, as this plan does

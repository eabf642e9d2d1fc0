"""Paged attention: launches of attention_kernel.py and combine.py over the work list of plan.py."""

import math
import os

import torch
import triton
from torch import Tensor

from ..cache import KVLayer
from ..metadata import AttentionMetadata, HeadLayout
from ..tiles import AttentionTiles, attention_tiles
from .attention_kernel import attention_kernel
from .codes import raw
from .combine import combine_kernel
from .plan import WorkList, head_groups_table, plan_work, refill_work

LOG2_E = math.log2(math.e)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


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
    tiles: AttentionTiles | None = None,
) -> Tensor:
    """See `ops.paged_attention`. One launch for decode rows and one for prefill rows, those that the step has."""
    chosen = attention_tiles(q.shape[2], cache.format, q.element_size()) if tiles is None else tiles
    group = triton.next_power_of_2(max(heads.q_per_kv))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    plans = meta.prepare(
        ("triton", chosen, group, window),
        lambda: plan_work(meta, chosen, group, window),
        lambda plans: refill_work(plans, meta, chosen, group, window),
    )
    for work in plans:
        _launch(work, q, cache, out, meta, heads, group, scale, window, soft_cap, sinks, lse)
    return out


def _launch(
    work: WorkList,
    q: Tensor,
    cache: KVLayer,
    out: Tensor,
    meta: AttentionMetadata,
    heads: HeadLayout,
    group: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
    lse: Tensor | None,
) -> None:
    head_dim = q.shape[2]
    k_rows, v_rows = raw(cache)
    tile_rows = max(work.tile_queries * group, 16)
    partial_shape = (work.num_partials, heads.num_kv_heads, tile_rows, head_dim)
    partial_out = torch.empty(partial_shape, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(partial_shape[:3], dtype=torch.float32, device=q.device)
    head_groups = head_groups_table(heads, q.device)
    lse_stride = 0 if lse is None else lse.stride(0)
    attention_kernel[(work.items.shape[0], heads.num_kv_heads)](
        q,
        k_rows,
        v_rows,
        cache.k_scale,
        cache.v_scale,
        sinks,
        out,
        lse,
        partial_out,
        partial_lse,
        work.items,
        meta.query_start,
        meta.context_lens,
        meta.block_tables,
        head_groups,
        scale * LOG2_E if soft_cap is None else 2 * LOG2_E * scale / soft_cap,
        None if soft_cap is None else LOG2_E * soft_cap,
        window,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        lse_stride,
        meta.block_tables.stride(0),
        FORMAT=cache.format,
        HEAD_DIM=head_dim,
        CHANNELS=max(triton.next_power_of_2(k_rows.shape[3]), 16),
        GROUP=group,
        TILE_ROWS=tile_rows,
        BLOCK_SIZE=cache.block_size,
        BLOCK_N=work.tile.block_n,
        CHUNK=work.tile.chunk,
        UPCAST=INTERPRETED,
        num_warps=work.tile.num_warps,
        num_stages=work.tile.num_stages,
    )
    if work.num_partials:
        combine_kernel[(work.combined.shape[0], heads.num_kv_heads)](
            sinks,
            out,
            lse,
            partial_out,
            partial_lse,
            work.combined,
            meta.query_start,
            head_groups,
            out.stride(0),
            lse_stride,
            HEAD_DIM=head_dim,
            CHANNELS=triton.next_power_of_2(head_dim),
            GROUP=group,
            TILE_ROWS=tile_rows,
            num_warps=4,
        )

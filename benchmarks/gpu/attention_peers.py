"""What kvshard's attention is compared with: torch on contiguous keys, and FlashInfer on the same blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import BOUNDS, Filled, import_flashinfer
from harness import NotHereError, Run
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

_WORKSPACE_BYTES = 256 << 20


def contiguous(filled: Filled) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer as torch wants them: [rows, num_kv, context, head_dim], one behind the other.

    This is torch's best case: it leaves out the copy that paging would need. Rows must be equally long.
    """
    rows, length = len(filled.counts), filled.shape.context_lens[0]
    assert set(filled.shape.context_lens) == {length}, "rows of one length"
    return [
        tuple(x.view(rows, length, *x.shape[1:]).transpose(1, 2).contiguous() for x in pair)
        for pair in zip(filled.keys, filled.values, strict=True)
    ]


def torch_attention(filled: Filled, backend: SDPBackend) -> Callable[[], Run]:
    """scaled_dot_product_attention of one back end, for rows of one length and one query length."""

    def make() -> Run:
        if backend == SDPBackend.CUDNN_ATTENTION and filled.device.type != "cuda":
            raise NotHereError("cuDNN needs a GPU")
        layers = contiguous(filled)
        shape = filled.shape
        rows, new, length = len(filled.counts), shape.query_lens[0], shape.context_lens[0]
        group = shape.num_q // shape.num_kv
        q = filled.q.view(rows, new, shape.num_q, shape.head_dim).transpose(1, 2)
        options: dict[str, Any] = {}
        if new == 1:
            # The queries of a KV head side by side, as if they were positions: keys are then read once for all.
            q = q.view(rows, shape.num_kv, group, shape.head_dim)
        elif new == length:
            options = {"is_causal": True, "enable_gqa": True}
        else:
            options = {"attn_mask": causal_lower_right(new, length), "enable_gqa": True}

        def run(i: int) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, *layers[i % len(layers)], **options)

        out = run(0)
        filled.check(out if new == 1 else out.transpose(1, 2), BOUNDS["auto"])
        return run

    return make


def flex(filled: Filled) -> Callable[[], Run]:
    """flex_attention on contiguous keys, compiled; for decode rows of one length."""

    def make() -> Run:
        from torch.nn.attention.flex_attention import flex_attention

        layers = contiguous(filled)
        q = filled.q.unsqueeze(2)
        on_gpu = filled.device.type == "cuda"
        attend = torch.compile(flex_attention) if on_gpu else flex_attention

        def run(i: int) -> Any:
            return attend(q, *layers[i % len(layers)], enable_gqa=True)

        filled.check(run(0), BOUNDS["auto"])
        return run

    return make


def flashinfer(filled: Filled) -> Callable[[], Run]:
    """FlashInfer on the caches that kvshard reads, its plan made once, as kvshard's is."""

    def make() -> Run:
        library = import_flashinfer()
        shape, meta = filled.shape, filled.meta
        layers = filled.layers("auto")
        lens = torch.tensor(shape.context_lens, dtype=torch.int32)
        counts = torch.tensor((0, *filled.counts), dtype=torch.int32)
        indptr = counts.cumsum(0, dtype=torch.int32).to(filled.device)
        last = ((lens - 1) % shape.block_size + 1).to(filled.device)
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=filled.device)
        sizes = (shape.num_q, shape.num_kv, shape.head_dim, shape.block_size)
        dtypes = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        if max(shape.query_lens) == 1:
            wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
            wrapper.plan(indptr, filled.blocks, last, *sizes, **dtypes)
        else:
            wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            wrapper.plan(meta.query_start, indptr, filled.blocks, last, *sizes, causal=True, **dtypes)

        def run(i: int) -> Any:
            layer = layers[i % len(layers)]
            return wrapper.run(filled.q, (layer.k, layer.v))

        filled.check(run(0), BOUNDS["auto"])
        return run

    return make

"""The door to the kernels: formulas, shapes and dtypes of every operation, and the choice of the back end.

Tensors on CUDA go to the Triton kernels, tensors on CPU to torch. `reference.py` defines the same operations in
plain torch. All arithmetic is float32 or better, whatever the dtype of the tensors; each result is rounded once.

T is the number of tokens in a step, D the head dimension, Hq and Hk the query and KV heads of this shard. Each
function raises ValueError when a shape, dtype or device does not fit; the contents of index tensors (positions,
slots, block tables) are the caller's promise, since reading them would stop the device.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from .metadata import AttentionMetadata, HeadLayout

__all__ = [
    "AttentionMetadata",
    "HeadLayout",
    "add_rms_norm",
    "kv_write",
    "paged_attention",
    "rms_norm",
    "rotary",
    "silu_mul",
]


class Backend(Protocol):
    """What `kernels.cpu` and `kernels.triton` offer. Arguments are already checked."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def rotary(self, q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None: ...

    def kv_write(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
    ) -> None: ...

    def silu_mul(self, gate_up: Tensor) -> Tensor: ...

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        heads: HeadLayout,
        scale: float,
        window: int | None,
    ) -> Tensor: ...


_PACKAGES = {"cuda": ".triton", "cpu": ".cpu"}


@cache
def _backend(device_type: str) -> Backend:
    """The back end of a device type; triton is imported only when the first CUDA tensor comes."""
    if device_type not in _PACKAGES:
        raise ValueError(f"device: expected one of {', '.join(_PACKAGES)}, got {device_type}")
    return cast(Backend, import_module(_PACKAGES[device_type], __package__))


def _check(name: str, tensor: Tensor, shape: Sequence[int | str], like: Tensor, dtype: torch.dtype) -> None:
    """Refuses a tensor with another shape (a str stands for any size), dtype or device than expected."""
    got = tensor.shape
    fits = len(got) == len(shape)
    if fits:
        for size, wanted in zip(got, shape, strict=True):
            if size != wanted and not isinstance(wanted, str):
                fits = False
    if not fits or tensor.dtype != dtype or tensor.device != like.device:
        expected = f"[{', '.join(map(str, shape))}] {dtype} on {like.device}"
        raise ValueError(
            f"{name}: expected shape {expected}, got {list(got)} {tensor.dtype} on {tensor.device}"
        )


def _check_rows(name: str, tensor: Tensor) -> None:
    """Refuses a tensor whose last dimension is strided: the kernels read rows of adjacent elements."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        raise ValueError(f"{name}: expected shape with adjacent last elements, got strides {tensor.stride()}")


def _check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    """Refuses a cache with gaps: the kernels work out where a slot lies from the shape alone."""
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns y = x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension (Zhang & Sennrich, 2019).

    x       [T, H], rows of adjacent elements
    weight  [H], dtype of x
    returns [T, H], dtype of x, contiguous. In float32 the bits are those of transformers' LlamaRMSNorm on CPU.
    """
    _check("x", x, ("T", "H"), x, x.dtype)
    _check("weight", weight, (x.shape[1],), x, x.dtype)
    _check_rows("x", x)
    return _backend(x.device.type).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to the residual stream in place and returns rms_norm(residual).

    x         [T, H], rows of adjacent elements
    residual  [T, H], dtype of x, contiguous; becomes residual + x, rounded to its dtype before it is normed
    weight    [H], dtype of x
    returns   [T, H], dtype of x, contiguous
    """
    _check("x", x, ("T", "H"), x, x.dtype)
    _check("residual", residual, x.shape, x, x.dtype)
    _check("weight", weight, (x.shape[1],), x, x.dtype)
    _check_rows("x", x)
    _check_rows("residual", residual)
    return _backend(x.device.type).add_rms_norm(x, residual, weight, eps)


def rotary(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
    """Turns query and key heads by their token's position, in place (RoPE, Su et al., 2021).

    The "rotate half" pairing of GPT-NeoX and Hugging Face: with r = rotary_dim / 2, channels c and c + r of a head
    form a pair (a, b), and c < r selects the angle:  a' = a cos - b sin,  b' = b cos + a sin.  Channels from
    rotary_dim on are left alone.

    q          [T, Hq, D], k [T, Hk, D], same dtype; may be views of one qkv tensor (last dimension adjacent)
    cos_sin    [max_positions, rotary_dim] float32: cos of the r angles, then sin; rotary_dim <= D, even
    positions  [T] int64, each < max_positions
    """
    _check("q", q, ("T", "Hq", "D"), q, q.dtype)
    _check("k", k, (q.shape[0], "Hk", q.shape[2]), q, q.dtype)
    _check("cos_sin", cos_sin, ("max_positions", "rotary_dim"), q, torch.float32)
    _check("positions", positions, (q.shape[0],), q, torch.int64)
    _check_rows("q", q)
    _check_rows("k", k)
    if cos_sin.shape[1] > q.shape[2] or cos_sin.shape[1] % 2:
        raise ValueError(
            f"cos_sin: expected shape [max_positions, even rotary_dim <= {q.shape[2]}], got {list(cos_sin.shape)}"
        )
    _backend(q.device.type).rotary(q, k, cos_sin, positions)


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Stores this step's keys and values in the cache: cache[slot // B, h, slot % B] = k[t, h], slot of token t.

    k, v              [T, Hk, D], dtype of the caches; may be views of one qkv tensor (last dimension adjacent)
    k_cache, v_cache  [num_blocks, Hk, B, D] contiguous, B = block_size; written in place
    slot_mapping      [T] int64: block * B + offset, or -1 for a token that is not stored (padding). Two tokens
                      of one call never share a slot.
    """
    _check("k", k, ("T", "Hk", "D"), k, k.dtype)
    _check("v", v, k.shape, k, k.dtype)
    _check("k_cache", k_cache, ("num_blocks", k.shape[1], "block_size", k.shape[2]), k, k.dtype)
    _check("v_cache", v_cache, k_cache.shape, k, k.dtype)
    _check_caches(k_cache, v_cache)
    _check("slot_mapping", slot_mapping, (k.shape[0],), k, torch.int64)
    _check_rows("k", k)
    _check_rows("v", v)
    _backend(k.device.type).kv_write(k, v, k_cache, v_cache, slot_mapping)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Returns silu(gate) * up with silu(x) = x / (1 + exp(-x)): the gated activation (SwiGLU, Shazeer, 2020).

    gate_up  [T, 2 * I], rows of adjacent elements: gate, then up. I may be 0.
    returns  [T, I], dtype of gate_up, contiguous
    """
    _check("gate_up", gate_up, ("T", "2 * I"), gate_up, gate_up.dtype)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected shape [T, 2 * I], got {list(gate_up.shape)}")
    _check_rows("gate_up", gate_up)
    return _backend(gate_up.device.type).silu_mul(gate_up)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    heads: HeadLayout,
    scale: float,
    *,
    window: int | None = None,
) -> Tensor:
    """Causal attention of this step's queries over the cache, for decode and prefill rows in one call.

    Query token i of row r has position p = context_lens[r] - query_len[r] + i. It sees positions j with
    p - window < j <= p (all j <= p without a window), where key j of KV head h is
    k_cache[block_tables[r, j // B], h, j % B]:  out = sum_j softmax_j(scale * q . k_j) v_j.
    K and V are read as stored, also those of this step (call kv_write first), so that the result does not
    depend on how a prompt was cut into steps. Slots that no position maps to are never used, whatever they hold.

    q                 [T, Hq, D], may be a view of a qkv tensor (last dimension adjacent); T = meta.num_tokens
    k_cache, v_cache  [num_blocks, Hk, B, D] contiguous, dtype of q
    meta, heads       rows of the step, and which query heads read which KV head
    scale             factor of the logits, usually D ** -0.5
    window            number of visible positions, the query's own included; None = all
    returns           [T, Hq, D], dtype of q, contiguous
    """
    _check("q", q, (meta.num_tokens, heads.num_q_heads, "D"), q, q.dtype)
    _check("k_cache", k_cache, ("num_blocks", heads.num_kv_heads, meta.block_size, q.shape[2]), q, q.dtype)
    _check("v_cache", v_cache, k_cache.shape, q, q.dtype)
    _check_caches(k_cache, v_cache)
    _check_rows("q", q)
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    return _backend(q.device.type).paged_attention(q, k_cache, v_cache, meta, heads, scale, window)

"""Storing new keys and values in the cache: one program per token writes all its heads."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def kv_write_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    num_kv_heads,
    block_size,
    head_dim,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """cache[slot // block_size, h, slot % block_size] = token's head h; nothing for slot -1."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    if slot >= 0:
        head = tl.arange(0, HEADS)[:, None]
        channel = tl.arange(0, CHANNELS)[None, :]
        inside = (head < num_kv_heads) & (channel < head_dim)
        row = ((slot // block_size) * num_kv_heads + head) * block_size + slot % block_size
        place = row * head_dim + channel
        k = tl.load(k_ptr + token * k_stride + head * k_head_stride + channel, mask=inside)
        v = tl.load(v_ptr + token * v_stride + head * v_head_stride + channel, mask=inside)
        tl.store(k_cache_ptr + place, k, mask=inside)
        tl.store(v_cache_ptr + place, v, mask=inside)


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """See `ops.kv_write`."""
    num_tokens, num_kv_heads, head_dim = k.shape
    kv_write_kernel[(num_tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        num_kv_heads,
        k_cache.shape[2],
        head_dim,
        HEADS=triton.next_power_of_2(num_kv_heads),
        CHANNELS=triton.next_power_of_2(head_dim),
        num_warps=4,
    )

"""Norms, rotary, cache writes and the gated activation on CPU. Formulas, shapes and dtypes: see `ops`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch's own RMSNorm: float32 inside, and the same order of operations as transformers' LlamaRMSNorm."""
    return F.rms_norm(x, (x.shape[1],), weight, eps).contiguous()


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place, then its norm."""
    residual += x
    return rms_norm(residual, weight, eps)


def rotary(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
    """Both halves of the pairs are computed before either is written back."""
    half = cos_sin.shape[1] // 2
    angles = cos_sin.index_select(0, positions).unsqueeze(1)
    cos, sin = angles[..., :half], angles[..., half:]
    for heads in (q, k):
        first, second = heads[..., :half], heads[..., half : 2 * half]
        wide_first, wide_second = first.float(), second.float()
        turned = wide_first * cos - wide_second * sin
        second.copy_(wide_second * cos + wide_first * sin)
        first.copy_(turned)


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """One indexed store per cache; tokens with slot -1 are left out."""
    stored = slot_mapping >= 0
    if not bool(stored.all()):
        k, v, slot_mapping = k[stored], v[stored], slot_mapping[stored]
    block_size = k_cache.shape[2]
    block = torch.div(slot_mapping, block_size, rounding_mode="floor")
    offset = slot_mapping - block * block_size
    k_cache[block, :, offset] = k
    v_cache[block, :, offset] = v


def silu_mul(gate_up: Tensor) -> Tensor:
    """float32 inside; one rounding at the end."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return F.silu(gate).mul_(up).to(gate_up.dtype)

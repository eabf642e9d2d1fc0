"""The operations on CPU, in torch: vectorised over rows and heads, no loop per sequence, head or token."""

from .attention import paged_attention
from .pointwise import add_rms_norm, kv_write, rms_norm, rotary, silu_mul

__all__ = ["add_rms_norm", "kv_write", "paged_attention", "rms_norm", "rotary", "silu_mul"]

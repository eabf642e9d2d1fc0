"""The operations on CPU: C, compiled when a shard first starts, with torch in its place where there is no compiler."""

from .attention import paged_attention
from .pointwise import add_rms_norm, gelu_mul, rms_norm, rotary_kv_write, silu_mul

__all__ = ["add_rms_norm", "gelu_mul", "paged_attention", "rms_norm", "rotary_kv_write", "silu_mul"]

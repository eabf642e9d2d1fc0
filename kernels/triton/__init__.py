"""The operations on CUDA, in Triton. Importing this package imports triton.

Rules of the kernels: values become float32 right after each load (the interpreter treats bfloat16 as integers, and
sums need it anyway), but for operands of tl.dot, and those too when interpreted; block ids, slots, tokens and heads
become int64 before they are multiplied.
"""

from .activation import gelu_mul, silu_mul
from .attention import paged_attention
from .norm import add_rms_norm, rms_norm
from .rotary_kv_write import rotary_kv_write

__all__ = ["add_rms_norm", "gelu_mul", "paged_attention", "rms_norm", "rotary_kv_write", "silu_mul"]

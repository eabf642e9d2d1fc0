"""The operations on CUDA, in Triton. Importing this package imports triton.

Rules of the kernels: values become float32 right after each load (the interpreter treats bfloat16 as integers, and
sums need it anyway); block ids, slots and token numbers become int64 before they are multiplied.
"""

from .activation import silu_mul
from .attention import paged_attention
from .kv_write import kv_write
from .norm import add_rms_norm, rms_norm
from .rotary import rotary

__all__ = ["add_rms_norm", "kv_write", "paged_attention", "rms_norm", "rotary", "silu_mul"]

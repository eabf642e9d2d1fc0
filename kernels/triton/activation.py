"""The gated activation: one program per token and block of columns."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import ACTIVATION_BLOCK


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, gate_up_stride, inner, BLOCK: tl.constexpr):
    """out = gate / (1 + exp(-gate)) * up."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate_ptr = gate_up_ptr + token * gate_up_stride + column
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + inner, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * inner + column, y.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `ops.silu_mul`."""
    num_tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, inner, dtype=gate_up.dtype, device=gate_up.device)
    if inner:
        grid = (num_tokens, triton.cdiv(inner, ACTIVATION_BLOCK))
        silu_mul_kernel[grid](gate_up, out, gate_up.stride(0), inner, BLOCK=ACTIVATION_BLOCK, num_warps=4)
    return out

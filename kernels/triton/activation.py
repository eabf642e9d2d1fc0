"""The gated activations: one program per token and block of columns."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import ACTIVATION_BLOCK

# gelu(x) = x / 2 * (1 + tanh(z)) = x / (1 + exp(-2 z)), since 1 + tanh(z) = 2 / (1 + exp(-2 z)):
# no difference of nearly equal numbers, and an overflow of exp means 0.
GELU_LINEAR = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi))
GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def gated_activation_kernel(
    gate_up_ptr, out_ptr, gate_up_stride, inner, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    """out = act(gate) * up; silu(x) = x / (1 + exp(-x)), gelu(x) = x / (1 + exp(-2 z)) with z of its tanh form."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate_ptr = gate_up_ptr + token * gate_up_stride + column
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + inner, mask=inside, other=0.0).to(tl.float32)
    steep = gate
    if GELU:
        steep = GELU_LINEAR * (gate + GELU_CUBIC * gate * gate * gate)
    y = gate / (1.0 + tl.exp(-steep)) * up
    tl.store(out_ptr + token * inner + column, y.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `ops.silu_mul`."""
    return _gated(gate_up, gelu=False)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """See `ops.gelu_mul`."""
    return _gated(gate_up, gelu=True)


def _gated(gate_up: Tensor, gelu: bool) -> Tensor:
    num_tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, inner, dtype=gate_up.dtype, device=gate_up.device)
    if inner:
        grid = (num_tokens, triton.cdiv(inner, ACTIVATION_BLOCK))
        gated_activation_kernel[grid](
            gate_up, out, gate_up.stride(0), inner, GELU=gelu, BLOCK=ACTIVATION_BLOCK, num_warps=4
        )
    return out

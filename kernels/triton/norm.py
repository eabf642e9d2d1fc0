"""RMSNorm, with and without the residual add: one program per token, the whole row in registers."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import row_tile


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, x_stride, hidden, eps, BLOCK: tl.constexpr):
    """out = x / sqrt(mean(x^2) + eps) * weight."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    x = tl.load(x_ptr + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / hidden + eps)) * weight
    tl.store(out_ptr + token * hidden + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, x_stride, residual_stride, hidden, eps, BLOCK: tl.constexpr
):
    """residual += x, rounded as it is stored; out = rms_norm(residual)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    residual_row = residual_ptr + token * residual_stride + column
    x = tl.load(x_ptr + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(residual_row, mask=inside, other=0.0).to(tl.float32) + x
    stored = total.to(residual_ptr.dtype.element_ty)
    tl.store(residual_row, stored, mask=inside)
    total = stored.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = total * (1.0 / tl.sqrt(tl.sum(total * total, 0) / hidden + eps)) * weight
    tl.store(out_ptr + token * hidden + column, y.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.rms_norm`."""
    num_tokens, hidden = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, warps = row_tile(hidden)
    rms_norm_kernel[(num_tokens,)](x, weight, out, x.stride(0), hidden, eps, BLOCK=block, num_warps=warps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.add_rms_norm`."""
    num_tokens, hidden = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, warps = row_tile(hidden)
    add_rms_norm_kernel[(num_tokens,)](
        x, residual, weight, out, x.stride(0), residual.stride(0), hidden, eps, BLOCK=block, num_warps=warps
    )
    return out

"""The door to products with weight matrices: formulas, shapes and dtypes, and the choice of the back end.

Weights come wrapped, since each back end may want them in an order of its own: packed for the matrix unit of the
processor, where it has one, and plain elsewhere. Products with a packed weight, and on CPU those of up to 64 tokens with a
plain one, are each summed in one order, so that a token's outputs have the same bits alone and in any batch; products of
torch's (cuBLAS, oneDNN) are not. A weight kept as codes gives, on each way, what its numbers give that were rounded to its
dtype first: on CPU to the bit, but for torch's products with a matrix of more than 64 MiB, which is widened in pieces.

T is the number of tokens, N and K the rows and columns of a weight. Each function raises ValueError when a shape, dtype
or device does not fit.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check, check_rows
from .cpu import linear as cpu
from .weight_codes import WeightCodes


@dataclass(frozen=True, eq=False)
class LinearWeight:
    """A matrix [N, K] that inputs of K channels are multiplied with; `values` are its numbers or codes, in rows or packed."""

    values: Tensor | WeightCodes
    packed: bool = False

    @classmethod
    def take(cls, weight: Tensor | WeightCodes) -> "LinearWeight":
        """Of a plain weight that nobody else reads from here on: where that helps it is packed, in place."""
        packed = weight.device.type == "cpu" and cpu.can_pack(weight)
        if packed:
            cpu.pack(weight)
        return cls(weight, packed)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


def linear(
    x: Tensor, weight: LinearWeight, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Returns x W^T + bias.

    x        [T, K], dtype of the weight, rows of adjacent elements
    weight   [N, K]
    bias     [N], dtype of x, or None
    dtype    of the result: that of x (None) or float32; torch (see above) rounds to the dtype of x first, the others do not
    returns  [T, N], contiguous
    """
    num_rows, width = weight.shape
    stored = weight.values if isinstance(weight.values, Tensor) else weight.values.codes
    check("x", x, ("T", width), stored, weight.values.dtype)
    check_rows("x", x)
    if bias is not None:
        check("bias", bias, (num_rows,), x, x.dtype)
        check_rows("bias", bias)
    if dtype not in (None, x.dtype, torch.float32):
        raise ValueError(f"dtype: expected {x.dtype} or {torch.float32}, got {dtype}")
    dtype = dtype or x.dtype
    if x.device.type == "cpu":
        return cpu.linear(x, weight.values, weight.packed, bias, dtype)
    if isinstance(weight.values, WeightCodes):
        from .triton.linear import quantised_linear

        return quantised_linear(x, weight.values, bias, dtype)
    return F.linear(x, weight.values, bias).to(dtype)


def embedding(ids: Tensor, weight: LinearWeight, first_row: int | None = None, scale: float = 1.0) -> Tensor:
    """Returns rows of a weight, as they were before it was packed, times `scale`.

    ids        integers of any shape
    first_row  the id of the weight's first row, where others are elsewhere: ids of those give zeros. None: the weight is
               whole, and another id is an IndexError (on CUDA, whose host does not look at them, one of the device's)
    scale      in the weight's dtype; the product is rounded once
    returns    [*ids.shape, K], dtype of the weight
    """
    values = weight.values
    if values.device.type == "cpu":
        found = cpu.rows(ids, values, weight.packed, first_row, scale)
        if found is not None:
            return found
    num_rows, width = values.shape
    if first_row is None:
        y = _look_up(ids, values)
    elif num_rows == 0:
        return torch.zeros(*ids.shape, width, dtype=values.dtype, device=values.device)
    else:
        local = ids - first_row
        elsewhere = (local < 0) | (local >= num_rows)
        y = _look_up(local.masked_fill_(elsewhere, 0), values).masked_fill_(elsewhere.unsqueeze(-1), 0)
    return y if scale == 1 else y.mul_(scale)


def _look_up(ids: Tensor, values: Tensor | WeightCodes) -> Tensor:
    if isinstance(values, Tensor):
        return F.embedding(ids, values)
    return values.rows(ids.flatten().long()).widen().view(*ids.shape, values.shape[1])

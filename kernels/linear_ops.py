"""The door to products with weight matrices: formulas, shapes and dtypes, and the choice of the back end.

Weights come wrapped, since each back end may want them in an order of its own: packed for the matrix unit of the
processor, where it has one, and plain for torch (cuBLAS, oneDNN) elsewhere. Packed products are summed in one order, so
that a token's outputs have the same bits alone and in any batch; torch's are not.

T is the number of tokens, N and K the rows and columns of a weight. Each function raises ValueError when a shape, dtype
or device does not fit.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check, check_rows
from .cpu import linear as cpu


@dataclass(frozen=True, eq=False)
class LinearWeight:
    """A matrix [N, K] that inputs of K channels are multiplied with; `values` are its numbers, in rows or packed."""

    values: Tensor
    packed: bool = False

    @classmethod
    def take(cls, weight: Tensor) -> "LinearWeight":
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
    dtype    of the result: that of x (None) or float32; torch rounds to the dtype of x first, packed products do not
    returns  [T, N], contiguous
    """
    num_rows, width = weight.shape
    check("x", x, ("T", width), weight.values, weight.values.dtype)
    check_rows("x", x)
    if bias is not None:
        check("bias", bias, (num_rows,), x, x.dtype)
    if dtype not in (None, x.dtype, torch.float32):
        raise ValueError(f"dtype: expected {x.dtype} or {torch.float32}, got {dtype}")
    dtype = dtype or x.dtype
    if weight.packed:
        return cpu.linear(x, weight.values, bias, dtype)
    return F.linear(x, weight.values, bias).to(dtype)


def embedding(ids: Tensor, weight: LinearWeight) -> Tensor:
    """Returns rows of a weight, as it was before it was packed.

    ids      integers of any shape, each 0 <= id < N: the caller's promise
    returns  [*ids.shape, K], dtype of the weight
    """
    if weight.packed:
        return cpu.rows(weight.values, ids)
    return F.embedding(ids, weight.values)

"""The door to products with weight matrices: formulas, shapes and dtypes, and the choice of the back end.

Weights come wrapped, since each back end may want them in an order of its own: packed for the matrix unit or the vectors of
the processor, or plain. Products with a packed weight, and on CPU those of up to 64 tokens with a plain one, are each summed
in one order, so that a token's outputs have the same bits alone and in any batch; products of torch's (cuBLAS, oneDNN) are
not. A weight kept as codes gives, on each way, what its numbers give that were rounded to its dtype first (to float32 where
it is packed for vectors of rows): on CPU to the bit, but for torch's products with a matrix of more than 64 MiB, which is
widened in pieces.

T is the number of tokens, N and K the rows and columns of a weight. Each function raises ValueError when a shape, dtype
or device does not fit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .checks import check, check_rows
from .cpu import linear as cpu
from .weight_codes import WeightCodes

Activation = Literal["silu", "gelu_tanh"]

_GATES: Mapping[Activation, Callable[[Tensor], Tensor]] = {"silu": ops.silu_mul, "gelu_tanh": ops.gelu_mul}
_TURN = 16  # rows


@dataclass(frozen=True, eq=False)
class LinearWeight:
    """A matrix [N, K] that inputs of K channels are multiplied with; `values` are its numbers or codes, in rows or packed."""

    values: Tensor | WeightCodes
    packed: bool = False
    in_turns: bool = False  # see take_gated

    @classmethod
    def take(cls, weight: Tensor | WeightCodes) -> "LinearWeight":
        """Of a plain weight that nobody else reads from here on: where that helps it is packed, in place."""
        packed = weight.device.type == "cpu" and cpu.can_pack(weight)
        if packed:
            cpu.pack(weight)
        return cls(weight, packed)

    @classmethod
    def take_gated(cls, weight: Tensor | WeightCodes) -> "LinearWeight":
        """Of the rows of a gate and below them as many of up, [2 * I, K], for `gated_linear` alone.

        Where they are packed, 16 rows of the one and 16 of the other lie in turns: a chunk that is packed has numbers and
        their gates.
        """
        num_rows = weight.shape[0]
        whole = num_rows > 0 and num_rows % (2 * _TURN) == 0
        in_turns = whole and weight.device.type == "cpu" and cpu.can_pack(weight)
        for tensor in weight.tensors if isinstance(weight, WeightCodes) else (weight,):
            if in_turns:
                parts = tensor.view(2, num_rows // 2 // _TURN, _TURN, -1)
                tensor.copy_(parts.transpose(0, 1).reshape(tensor.shape))
        taken = cls.take(weight)
        return cls(taken.values, taken.packed, in_turns)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


def gated_linear(x: Tensor, weight: LinearWeight, activation: Activation) -> Tensor:
    """Returns the gated activation (`ops.silu_mul`, `ops.gelu_mul`) of x W^T, of a weight that `take_gated` took.

    x          [T, K], dtype of the weight, rows of adjacent elements
    weight     [2 * I, K]: the gate, then up
    returns    [T, I], dtype of x, contiguous; products are rounded to it first
    """
    if not weight.in_turns:
        return _GATES[activation](linear(x, weight))
    _check_input(x, weight)
    return cpu.gated_linear(x, weight.values, activation == "gelu_tanh")


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
    assert not weight.in_turns, "its rows are in another order: gated_linear"
    _check_input(x, weight)
    if bias is not None:
        check("bias", bias, weight.shape[:1], x, x.dtype)
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


def _check_input(x: Tensor, weight: LinearWeight) -> None:
    stored = weight.values if isinstance(weight.values, Tensor) else weight.values.codes
    check("x", x, ("T", weight.shape[1]), stored, weight.values.dtype)
    check_rows("x", x)


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

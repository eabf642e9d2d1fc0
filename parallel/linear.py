"""Linear layers whose weight is split over the ranks of a group.

They hold their weights and are given their group: a layer can be built and tested without any process group.
The split follows Megatron-LM (Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053): a column-parallel layer
needs no communication, the row-parallel layer behind it needs one sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.linear_ops import Activation, LinearWeight, gated_linear, linear
from .group import Group


class ColumnParallelLinear:
    """`y_local = x @ weight.T + bias`, where each rank has some of the output columns. No communication.

    Shapes on rank r (the sum of `out_local` over the ranks is the layer's whole width; shares may be uneven or 0):

    | tensor    | shape             | placement                         |
    |-----------|-------------------|-----------------------------------|
    | x         | [R, in]           | the same on all ranks             |
    | weight    | [out_local, in]   | split over rows                   |
    | bias      | [out_local]       | split like the weight's rows      |
    | y_local   | [R, out_local]    | split over columns, dtype of x    |
    """

    def __init__(self, weight: LinearWeight, bias: Tensor | None = None) -> None:
        assert len(weight.shape) == 2, f"weight must be [out_local, in], got {tuple(weight.shape)}"
        assert bias is None or bias.shape == weight.shape[:1], "bias must be [out_local]"
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class ColumnParallelGatedLinear:
    """`y_local = act(x @ gate.T) * (x @ up.T)`, where each rank has the same columns of both. No communication.

    | tensor    | shape                 | placement                                      |
    |-----------|-----------------------|------------------------------------------------|
    | x         | [R, in]               | the same on all ranks                          |
    | weight    | [2 * out_local, in]   | gate, then up: split over the rows of each     |
    | y_local   | [R, out_local]        | split over columns, dtype of x                 |
    """

    def __init__(self, weight: LinearWeight, activation: Activation) -> None:
        """`weight`: one that `LinearWeight.take_gated` took."""
        assert len(weight.shape) == 2, f"weight must be [2 * out_local, in], got {tuple(weight.shape)}"
        assert weight.shape[0] % 2 == 0, "weight must have as many rows of gate as of up"
        self.weight = weight
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        return gated_linear(x, self.weight, self.activation)


def row_parallel_linear(x_local: Tensor, weight: LinearWeight, group: Group, where: str) -> Tensor:
    """The product of one rank's slice and its sum over the ranks, as one operation.

    Nothing else may compute a row-parallel product: how its terms are ordered is decided here alone.

    x_local: [R, in_local], weight: [out, in_local], both of one dtype; in_local may be 0 (then this rank adds zeros).
    Returns [R, out], the same bits on all ranks. Raises GroupError if the sum does not come about.
    """
    return group.all_reduce(linear(x_local, weight), where)


class RowParallelLinear:
    """`y = sum over ranks of (x_local @ weight.T) + bias`, where each rank has some of the input columns.

    Shapes on rank r (the sum of `in_local` over the ranks is the layer's whole input; shares may be uneven or 0):

    | tensor    | shape             | placement                         |
    |-----------|-------------------|-----------------------------------|
    | x_local   | [R, in_local]     | split over columns                |
    | weight    | [out, in_local]   | split over columns                |
    | bias      | [out]             | the same on all ranks             |
    | y         | [R, out]          | the same on all ranks             |

    The bias is added once, after the sum. `where` names the layer and op in error reports, e.g. "layer 3 o_proj".
    """

    def __init__(self, weight: LinearWeight, group: Group, where: str, bias: Tensor | None = None) -> None:
        assert len(weight.shape) == 2, f"weight must be [out, in_local], got {tuple(weight.shape)}"
        assert bias is None or bias.shape == weight.shape[:1], "bias must be [out]"
        self.weight = weight
        self.bias = bias
        self.group = group
        self.where = where

    def __call__(self, x_local: Tensor) -> Tensor:
        y = row_parallel_linear(x_local, self.weight, self.group, self.where)
        return y if self.bias is None else torch.add(y, self.bias, out=y)

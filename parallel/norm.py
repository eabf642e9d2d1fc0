"""RMSNorm over a width that is split over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .group import Group


@dataclass(frozen=True)
class SplitWidth:
    """One tensor's share. Columns that several ranks hold are in `counted` of exactly one of them."""

    weight: Tensor  # [out_local]
    width: int  # columns of all ranks together, each counted once
    counted: slice  # of the local columns, those whose squares this rank adds to the sum


class SplitWidthRMSNorm:
    """`x / sqrt(mean(x^2) + eps) * weight`, the mean over the columns of all ranks, for several x with one sum.

    A column-parallel layer's output is split, and with it the sum of squares: each rank gives its own, [R, number of
    x] float32 numbers, and all get the total with the same bits.

    | tensor    | shape            | placement                                                   |
    |-----------|------------------|-------------------------------------------------------------|
    | x_local   | [R, out_local]   | split over columns, changed in place; may be a view of rows |
    | weight    | [out_local]      | split like the columns, dtype of x                          |

    `where` names the layer and op in error reports. Raises GroupError if the sum does not come about.
    """

    def __init__(self, shares: Sequence[SplitWidth], eps: float, group: Group, where: str) -> None:
        self.shares = tuple(shares)
        self.eps = eps
        self.group = group
        self.where = where

    def __call__(self, *xs: Tensor) -> None:
        squares = torch.stack(
            [
                x[:, share.counted].float().square().sum(dim=1)
                for x, share in zip(xs, self.shares, strict=True)
            ],
            dim=1,
        )
        totals = self.group.all_reduce(squares, self.where)  # [R, number of x]
        for index, (x, share) in enumerate(zip(xs, self.shares, strict=True)):
            scale = torch.rsqrt(totals[:, index, None] / share.width + self.eps)
            x.copy_(x.float() * scale * share.weight)

"""A weight matrix [N, K] kept as codes of 8 or 4 bits: each 32 channels of a row, a group, share a scale.

    number = code * scale                a signed code of 8 bits, or one of 4 bits less 8
    number = code * scale + minimum      of 4 bits, where there are minima

These are the numbers of GGUF's Q8_0, Q4_0 and Q4_1 blocks, in float32; they are rounded to `dtype` once, wherever the matrix
is used, but for products in vectors of rows on CPU (cpu/linear_lanes.h), which take them as they are. So results are those of
a matrix that had been widened to `dtype`, or to float32, when it was loaded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32  # channels


@dataclass(frozen=True, eq=False)
class WeightCodes:
    """Raises ValueError when shapes or dtypes do not fit together."""

    codes: Tensor  # int8 [N, K], or uint8 [N, K / 2]: channel i of a group in the lower half of byte i, channel 16 + i above it
    scales: Tensor  # float16 [N, K / 32]
    minima: Tensor | None  # the same, or None; only of codes of 4 bits
    dtype: torch.dtype  # of the numbers: float32, bfloat16 or float16

    def __post_init__(self) -> None:
        rows, groups = self.scales.shape
        halves = self.codes.dtype == torch.uint8
        expected = (rows, groups * (GROUP // 2 if halves else GROUP))
        if self.codes.dtype not in (torch.int8, torch.uint8) or self.codes.shape != expected:
            raise ValueError(
                f"codes: expected int8 [{rows}, {groups * GROUP}] or uint8 [{rows}, {groups * GROUP // 2}] for scales "
                f"{list(self.scales.shape)}, got {list(self.codes.shape)} {self.codes.dtype}"
            )
        if self.minima is not None and not halves:
            raise ValueError("minima: codes of 8 bits have none")
        for name, tensor in (("codes", self.codes), ("scales", self.scales), ("minima", self.minima)):
            if tensor is None:
                continue
            if name != "codes" and (tensor.dtype != torch.float16 or tensor.shape != self.scales.shape):
                raise ValueError(
                    f"{name}: expected float16 {list(self.scales.shape)}, got {list(tensor.shape)} {tensor.dtype}"
                )
            if not tensor.is_contiguous() or tensor.device != self.codes.device:
                raise ValueError(f"{name}: expected to be contiguous and on {self.codes.device}")
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {self.dtype}")

    @property
    def bits(self) -> int:
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.scales.shape[0], self.scales.shape[1] * GROUP))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored."""
        return tuple(t for t in (self.codes, self.scales, self.minima) if t is not None)

    def rows(self, which: slice | Tensor) -> "WeightCodes":
        """Some rows: a view of a slice, a copy of those that a tensor [R] of indices names."""
        minima = None if self.minima is None else self.minima[which]
        return WeightCodes(self.codes[which], self.scales[which], minima, self.dtype)

    def widen(self) -> Tensor:
        """The numbers, [N, K] of `dtype`."""
        rows, groups = self.scales.shape
        codes = self.codes.view(rows, groups, GROUP // (8 // self.bits))
        if self.bits == 4:
            codes = torch.cat((codes & 15, codes >> 4), dim=2)
        numbers = codes.float()
        if self.bits == 4 and self.minima is None:
            numbers -= 8
        numbers *= self.scales.float().unsqueeze(2)
        if self.minima is not None:
            numbers += self.minima.float().unsqueeze(2)
        return numbers.view(rows, groups * GROUP).to(self.dtype)

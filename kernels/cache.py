"""How keys and values are stored: as computed, or in 8 or 4 bits with a scale per token and KV head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CacheFormat = Literal["auto", "int8", "fp8", "int4"]

FORMAT_OF_DTYPE: dict[torch.dtype, CacheFormat] = {
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
    torch.uint8: "int4",
}
_DTYPE_OF_FORMAT = {name: dtype for dtype, name in FORMAT_OF_DTYPE.items()}

SCALE_DTYPE = torch.float16


@dataclass(frozen=True, eq=False)
class KVLayer:
    """The cache of one layer on one rank. B is the block size, D the head dimension.

    k, v              [num_blocks, Hk, B, W] contiguous. One row holds one token's key or value of one head:
                        auto   W = D values of the model's dtype
                        int8   W = D codes, value = code * scale
                        fp8    W = D codes of float8_e4m3fn, value = code * scale
                        int4   W = D / 2 bytes: channel c in the low half, channel c + D / 2 in the high half of
                               byte c, value = (half - 7.5) * scale; keys are mixed over channels (see `ops`)
    k_scale, v_scale  [num_blocks, Hk, B] float16, contiguous; None with auto
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @classmethod
    def empty(
        cls,
        format: CacheFormat,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> KVLayer:
        """Uninitialised memory. shape: [num_blocks, Hk, B, D]; dtype: the model's."""
        rows, head_dim = shape[:3], shape[3]
        if format == "auto":
            return cls(*(torch.empty(shape, dtype=dtype, device=device) for _ in "kv"))
        assert head_dim % 2 == 0, f"head_dim={head_dim} is odd"
        width = head_dim // 2 if format == "int4" else head_dim
        stored = _DTYPE_OF_FORMAT[format]
        return cls(
            *(torch.empty((*rows, width), dtype=stored, device=device) for _ in "kv"),
            *(torch.empty(rows, dtype=SCALE_DTYPE, device=device) for _ in "kv"),
        )

    @property
    def format(self) -> CacheFormat:
        return FORMAT_OF_DTYPE.get(self.k.dtype, "auto")

    @property
    def block_size(self) -> int:
        return self.k.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3] * (2 if self.k.dtype == torch.uint8 else 1)

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None]

    def to(self, device: torch.device | str) -> KVLayer:
        """A copy on another device, or itself."""
        return self._each(lambda x: x.to(device))

    def clone(self) -> KVLayer:
        return self._each(torch.clone)

    def fill_(self, value: float, block_ids: list[int] | slice = slice(None)) -> None:
        """Overwrite blocks, so that every element of them reads as `value` or, quantised, as a multiple of it."""
        for rows, scale in ((self.k, self.k_scale), (self.v, self.v_scale)):
            if scale is None:
                rows[block_ids] = value
            else:
                scale[block_ids] = value

    def _each(self, copy: Callable[[Tensor], Tensor]) -> KVLayer:
        scales = (None if x is None else copy(x) for x in (self.k_scale, self.v_scale))
        return KVLayer(copy(self.k), copy(self.v), *scales)

"""This rank's K and V of every layer, in blocks."""

import torch
from torch import Tensor

from ...parallel.shard_map import Shard
from ..models.spec import ModelSpec


class KVCache:
    """Per layer k and v: [num_blocks, num_kv_heads_local, block_size, head_dim].

    One (block, head) is contiguous. Block 0 is never given to a request. The memory is not
    initialised: nothing may read a slot that was not written.
    """

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks, len(shard.kv_heads), block_size, spec.head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.k: list[Tensor] = [
            torch.empty(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)
        ]
        self.v: list[Tensor] = [
            torch.empty(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of the storages of all K and V tensors."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.k + self.v)

    def fill(self, value: float, block_ids: list[int] | None = None) -> None:
        """Overwrite all blocks, or the given ones, with `value` (poison for tests)."""
        for tensor in self.k + self.v:
            if block_ids is None:
                tensor.fill_(value)
            else:
                tensor[block_ids] = value

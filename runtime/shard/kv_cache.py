"""This rank's K and V of every layer, in blocks."""

import torch

from ...kernels.ops import CacheFormat, KVLayer
from ...parallel.shard_map import Shard
from ..models.spec import ModelSpec


class KVCache:
    """A KVLayer per layer, all with the same blocks.

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
        format: CacheFormat,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks, len(shard.kv_heads), block_size, spec.head_dim)
        self.layers = [KVLayer.empty(format, shape, dtype, device) for _ in range(spec.num_layers)]

    @property
    def num_bytes(self) -> int:
        """Bytes of the storages of all K and V tensors."""
        return sum(tensor.untyped_storage().nbytes() for layer in self.layers for tensor in layer.tensors)

    def fill(self, value: float, block_ids: list[int] | None = None) -> None:
        """Overwrite all blocks, or the given ones, with `value` (poison for tests)."""
        for layer in self.layers:
            layer.fill_(value, slice(None) if block_ids is None else block_ids)

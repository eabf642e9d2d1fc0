"""This rank's K and V of every layer, in blocks."""

from collections.abc import Sequence

import numpy as np
import torch

from ...kernels.host import prefer_huge_pages, to_device
from ...kernels.ops import CacheFormat, KVLayer
from ...parallel.shard_map import Shard
from ..coordinator.plan import CopiedBlock
from ..models.spec import ModelSpec


class KVCache:
    """A KVLayer per layer; the layers of a group have the same blocks.

    One (block, head) is contiguous. Block 0 is never given to a request. The memory is not
    initialised: nothing may read a slot that was not written.
    """

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        *,
        group_blocks: Sequence[int],
        block_size: int,
        format: CacheFormat,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """group_blocks: number of blocks of each of the model's layer groups."""
        self.group_blocks = tuple(group_blocks)
        self._groups = [spec.layer_group(layer) for layer in range(spec.num_layers)]
        heads = len(shard.kv_heads)
        self.layers = [
            KVLayer.empty(format, (group_blocks[group], heads, block_size, spec.head_dim), dtype, device)
            for group in self._groups
        ]
        for layer in self.layers:
            for tensor in layer.tensors:
                prefer_huge_pages(tensor)

    @property
    def num_layer_blocks(self) -> int:
        """Blocks of all layers, each layer's counted for itself."""
        return sum(layer.k.shape[0] for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of the storages of all K and V tensors."""
        return sum(tensor.untyped_storage().nbytes() for layer in self.layers for tensor in layer.tensors)

    def copy(self, copied: Sequence[CopiedBlock]) -> None:
        """Let blocks begin as others do: in all layers of their group."""
        device = self.layers[0].k.device
        for group in {block.group for block in copied}:
            pairs = [(block.source, block.target) for block in copied if block.group == group]
            sources, targets = to_device(np.array(pairs, np.int64).T.copy(), device)
            for layer, its_group in zip(self.layers, self._groups, strict=True):
                if its_group == group:
                    for tensor in layer.tensors:
                        tensor[targets] = tensor[sources]

    def fill(self, value: float, group: int | None = None, block_ids: list[int] | None = None) -> None:
        """Overwrite all blocks, or the given ones of one layer group, with `value` (poison for tests)."""
        for layer, its_group in zip(self.layers, self._groups, strict=True):
            if group in (None, its_group):
                layer.fill_(value, slice(None) if block_ids is None else block_ids)

"""How many blocks the KV cache has, and what they take."""

import sys
from operator import itemgetter

from ..config import CacheConfig
from ..coordinator.limits import Limits

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SCALE_BYTES = 2


def cache_row_bytes(cache_dtype: str, head_dim: int) -> int:
    """Bytes of one key, or value, of one head: its channels, and the float16 scale of the quantised formats."""
    if cache_dtype in DTYPE_BYTES:
        return head_dim * DTYPE_BYTES[cache_dtype]
    return (head_dim // 2 if cache_dtype == "int4" else head_dim) + _SCALE_BYTES


def fitting_blocks(num_layer_blocks: int, limits: Limits) -> int:
    """The most `num_blocks` for which there is room, where single layers have room for so many blocks in all.

    If all that windows can use fits and there is nothing else, it is without limit: sys.maxsize.
    """
    num_layers = sum(group.num_layers for group in limits.layer_groups)
    for most, group in sorted(zip(limits.most_blocks, limits.layer_groups, strict=True), key=itemgetter(0)):
        if group.window is None:
            continue
        if num_layer_blocks < most * num_layers:
            break
        num_layer_blocks -= most * group.num_layers
        num_layers -= group.num_layers
    return num_layer_blocks // num_layers if num_layers > 0 else sys.maxsize


def choose_num_blocks(cache: CacheConfig, most_useful: int, fitting: int | None) -> int:
    """`cache.num_blocks`, or what fits on the rank with least room, None if that is not known."""
    if cache.num_blocks is not None:
        return cache.num_blocks
    return most_useful if fitting is None else min(most_useful, fitting)

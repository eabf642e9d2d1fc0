"""How many blocks fit."""

import dataclasses
import sys

import pytest

from kvshard.runtime.coordinator.limits import Limits
from kvshard.runtime.models.spec import LayerGroup
from kvshard.runtime.observe.cache_size import fitting_blocks


@pytest.mark.parametrize("windows", [(None,), (None, 40), (None, 40, 9), (40,), (40, 9)], ids=str)
def test_fitting_blocks_are_the_most_that_fit(windows: tuple[int | None, ...]) -> None:
    limits = Limits(
        num_blocks=2,
        block_size=4,
        max_model_len=400,
        max_num_seqs=3,
        max_num_batched_tokens=8,
        layer_groups=tuple(LayerGroup(window, layers) for layers, window in enumerate(windows, 2)),
    )
    for room in range(0, 900, 7):
        fitting = fitting_blocks(room, limits)
        if fitting == sys.maxsize:
            assert None not in windows
            fitting = max(limits.most_blocks)
            assert dataclasses.replace(limits, num_blocks=2 * fitting).num_layer_blocks <= room
        else:
            assert dataclasses.replace(limits, num_blocks=fitting + 1).num_layer_blocks > room
        assert dataclasses.replace(limits, num_blocks=fitting).num_layer_blocks <= room

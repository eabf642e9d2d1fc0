"""Blocks against a plain model of who holds what."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvshard.runtime.coordinator.block_manager import BlockManager


class BlocksAgainstModel(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(2, 20))
    def start(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.blocks = BlockManager(num_blocks)
        self.holders: list[list[int]] = []

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.blocks.num_free))
        before = {block for held in self.holders for block in held}
        got = self.blocks.allocate(count)
        assert len(set(got)) == count
        assert not before & set(got)
        assert all(0 < block < self.num_blocks for block in got)
        self.holders.append(got)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.holders))
        prefix = held[: data.draw(st.integers(0, len(held)))]
        self.blocks.share(prefix)
        self.holders.append(list(prefix))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        self.blocks.free(self.holders.pop(index))

    @invariant()
    def counts_agree(self) -> None:
        self.blocks.check_integrity()
        all_held = [block for held in self.holders for block in held]
        assert self.blocks.num_used == len(set(all_held))
        assert self.blocks.num_used + self.blocks.num_free == self.num_blocks - 1
        for block in range(self.num_blocks):
            assert self.blocks.num_holders(block) == all_held.count(block)


BlocksAgainstModel.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestBlocksAgainstModel = BlocksAgainstModel.TestCase


def test_wrong_use_is_caught() -> None:
    blocks = BlockManager(4)
    held = blocks.allocate(2)
    with pytest.raises(AssertionError, match="2 blocks wanted, 1 are free"):
        blocks.allocate(2)
    blocks.free(held)
    with pytest.raises(AssertionError, match="freed twice"):
        blocks.free(held)
    with pytest.raises(AssertionError, match="is free"):
        blocks.share(held)
    with pytest.raises(AssertionError, match="freed twice"):
        blocks.free([0])


def test_integrity_check_finds_a_lost_and_a_doubled_block() -> None:
    blocks = BlockManager(5)
    blocks.allocate(2)
    lost = blocks._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        blocks.check_integrity()
    blocks._free += [lost, lost]
    with pytest.raises(AssertionError, match="twice"):
        blocks.check_integrity()

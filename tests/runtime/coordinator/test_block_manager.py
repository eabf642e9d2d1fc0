"""Blocks against a plain model of who holds what, and what is kept under which hash."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvshard.runtime.coordinator.block_manager import BlockManager


def find(blocks: BlockManager, names: list[bytes]) -> list[int]:
    """The blocks of the first names, up to the first that has none."""
    found = [blocks.find(name) for name in names]
    return [block for block in (found[: found.index(None)] if None in found else found) if block is not None]


class BlocksAgainstModel(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(2, 20))
    def start(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.blocks = BlockManager(num_blocks)
        self.holders: list[list[int]] = []
        self.published: dict[bytes, int] = {}
        self.cached: list[int] = []  # the first to go first

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.blocks.num_free))
        before = {block for held in self.holders for block in held}
        num_plain = self.num_blocks - 1 - len(before) - len(self.cached)
        evicted, self.cached = (
            self.cached[: max(count - num_plain, 0)],
            self.cached[max(count - num_plain, 0) :],
        )
        self.published = {name: block for name, block in self.published.items() if block not in evicted}
        got = self.blocks.allocate(count)
        assert len(set(got)) == count
        assert not before & set(got)
        assert not set(self.cached) & set(got)
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
        given_up = self.holders.pop(index)
        self.blocks.free(given_up)
        held = {block for held in self.holders for block in held}
        kept = set(self.published.values()) - held
        self.cached += [block for block in reversed(given_up) if block in kept]

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data(), number=st.integers(0, 9))
    def publish(self, data: st.DataObject, number: int) -> None:
        held = sorted({block for held in self.holders for block in held} - set(self.published.values()))
        if held:
            block, name = data.draw(st.sampled_from(held)), b"%d" % number
            self.blocks.publish(block, name)
            self.published.setdefault(name, block)

    @rule(names=st.lists(st.integers(0, 9).map(lambda number: b"%d" % number), unique=True, max_size=3))
    def find_and_share(self, names: list[bytes]) -> None:
        wanted = [self.published.get(name, 0) for name in names]
        wanted = wanted[: wanted.index(0)] if 0 in wanted else wanted
        found = find(self.blocks, names)
        assert found == wanted
        num_free = self.blocks.num_free_beside(found)
        self.blocks.share(found)
        assert self.blocks.num_free == num_free
        self.cached = [block for block in self.cached if block not in found]
        self.holders.append(found)

    @rule(number=st.integers(0, 9))
    def withdraw(self, number: int) -> None:
        self.blocks.withdraw([b"%d" % number])
        block = self.published.pop(b"%d" % number, 0)
        self.cached = [other for other in self.cached if other != block]

    @invariant()
    def counts_agree(self) -> None:
        self.blocks.check_integrity()
        all_held = [block for held in self.holders for block in held]
        for block in range(self.num_blocks):
            assert self.blocks.is_published(block) == (block in self.published.values())
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


def test_integrity_check_finds_what_is_kept_wrongly() -> None:
    blocks = BlockManager(5)
    held = blocks.allocate(3)
    blocks.publish(held[0], b"first")
    blocks.publish(held[1], b"second")
    blocks.free(held[:1])
    blocks.check_integrity()
    blocks._free.append(held[0])
    with pytest.raises(AssertionError, match="free and cached"):
        blocks.check_integrity()
    del blocks._cached[held[0]]
    with pytest.raises(AssertionError, match="published and free"):
        blocks.check_integrity()
    del blocks._hashes[held[0]]
    with pytest.raises(AssertionError):
        blocks.check_integrity()


def test_blocks_of_a_sequence_go_from_the_last_to_the_first() -> None:
    blocks = BlockManager(6)
    held = blocks.allocate(4)
    names = [b"a", b"b", b"c", b"d"]
    for block, name in zip(held[:3], names, strict=False):
        blocks.publish(block, name)
    blocks.free(held)
    assert blocks.num_free == 5
    for num_left in (3, 3, 2, 1, 0):
        blocks.allocate(1)
        assert find(blocks, names) == held[:num_left]


def test_the_second_with_a_hash_is_not_kept() -> None:
    blocks = BlockManager(4)
    first, second = blocks.allocate(2)
    blocks.publish(first, b"same")
    blocks.publish(second, b"same")
    blocks.free([first])
    blocks.free([second])
    assert blocks.find(b"same") == first
    assert not blocks.is_published(second)
    assert blocks.num_used == 0
    with pytest.raises(AssertionError, match="nobody holds it"):
        blocks.publish(second, b"other")

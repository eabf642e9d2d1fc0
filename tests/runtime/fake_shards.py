"""Shards without a model, which trust no plan: each rule that a plan must keep is checked.

The "KV cache" holds, in every layer group, the token written at each place, and the next token is a hash of
what each group sees as read back from there: the sequence, or as much of its end as the window is wide. So a
wrong block, a lost token or a stale one changes what comes out, and the right answer can be computed without
any cache.
"""

from collections import deque
from collections.abc import Callable

import numpy as np
from fake_answers import next_token, noise_key, token_logprob

from kvshard.runtime.coordinator.limits import Limits
from kvshard.runtime.coordinator.logprobs import LogprobTable
from kvshard.runtime.coordinator.plan import (
    NO_TOKEN,
    OpenedSlot,
    SlotSampling,
    StepPlan,
    StepResult,
    Targets,
    decode_plan,
    decode_result,
    encode_plan,
    encode_result,
)

POISON = -7  # in every place of the cache that nobody has written, or that was given up


def make_table(tokens: list[tuple[int, float]]) -> LogprobTable:
    """Places where no other tokens are looked at."""
    columns = np.array(tokens, np.float64).reshape(-1, 2, 1)
    ones = np.ones((len(tokens), 1), np.int32)
    return LogprobTable(columns[:, 0].astype(np.int32), columns[:, 1].astype(np.float32), ones)


class _Slot:
    def __init__(self, opened: OpenedSlot) -> None:
        self.tables = [list(block_ids) for block_ids in opened.block_ids]
        self.context_len = opened.context_len
        self.sampling = opened.sampling
        self.last_sampled: int | None = None
        self.sampled_in = -1


class FakeShards:
    """Runs each plan when it is submitted; the coordinator sees nothing of it before `result`."""

    def __init__(self, limits: Limits, epoch: int = 0) -> None:
        self.limits = limits
        self.epoch = epoch
        self.windows = tuple(group.window for group in limits.layer_groups)
        self.caches = [np.full((num, limits.block_size), POISON, np.int64) for num in limits.group_blocks]
        self.owners: dict[tuple[int, int], set[int]] = {}  # (layer group, block) -> the slots that hold it
        # Whether the contents of a group's block may be asked for again.
        self.is_kept: Callable[[int, int], bool] = lambda group, block: False
        self.slots: dict[int, _Slot] = {}
        self.plans: list[StepPlan] = []
        self.without_token: Callable[[int, int], bool] = lambda num_tokens, seed: False
        self._in_flight: deque[bytes] = deque()

    def submit(self, plan: StepPlan) -> None:
        plan = decode_plan(encode_plan(plan))
        assert (plan.epoch, plan.step_id) == (self.epoch, len(self.plans)), "a gap in the steps"
        self.plans.append(plan)
        assert 0 < plan.num_rows <= self.limits.max_num_seqs
        assert plan.num_tokens <= self.limits.max_num_batched_tokens
        assert len(set(plan.row_slots.tolist())) == plan.num_rows, "a slot is in two rows"
        for slot in plan.closed_slots.tolist():
            self._close(slot)
        for slot in self.slots:
            self._pass(slot)
        for opened in plan.opened:
            self._open(opened)
        appended = (plan.appended_slots, plan.appended_groups, plan.appended_blocks)
        for slot, group, block in zip(*(values.tolist() for values in appended), strict=True):
            assert slot in self.slots, f"a block for slot {slot}, which is not open"
            self._own(slot, group, block)
            self.slots[slot].tables[group].append(block)
        targets = {(group, target) for group, _, target in plan.copied}
        assert len(targets) == len(plan.copied), "two copies into one block"
        for group, source, target in plan.copied:
            assert (group, source) not in targets, "a block is copied that is a copy of the same plan"
            [slot] = self.owners[group, target]
            num_valid = self.slots[slot].context_len % self.limits.block_size
            assert POISON not in self.caches[group][source, :num_valid], (
                f"block {source} is copied and not filled"
            )
            self.caches[group][target, :num_valid] = self.caches[group][source, :num_valid]
        self._in_flight.append(encode_result(self._run_rows(plan)))
        assert len(self._in_flight) <= self.limits.run_ahead + 1, "too many plans in flight"

    def result(self) -> StepResult:
        return decode_result(self._in_flight.popleft())

    def _open(self, opened: OpenedSlot) -> None:
        assert 0 <= opened.slot < self.limits.max_num_seqs
        assert opened.slot not in self.slots, f"slot {opened.slot} is open already"
        self.slots[opened.slot] = _Slot(opened)
        num_shared = opened.context_len // self.limits.block_size
        for group, block_ids in enumerate(opened.block_ids):
            first = self._first_seen(group, opened.context_len)
            assert not any(block_ids[:first]), "a block is shared that no query sees"
            for block in block_ids[first:num_shared]:
                assert POISON not in self.caches[group][block], f"block {block} is shared and not full"
                self.owners.setdefault((group, block), set()).add(opened.slot)
            for block in block_ids[num_shared:]:
                self._own(opened.slot, group, block)

    def _close(self, slot: int) -> None:
        for group, table in enumerate(self.slots.pop(slot).tables):
            for block in filter(None, table):
                self.owners[group, block].remove(slot)
                if not self.owners[group, block] and not self.is_kept(group, block):
                    self.caches[group][block] = POISON

    def _first_seen(self, group: int, position: int) -> int:
        """The first entry of a block table that a query at `position` reads."""
        window = self.windows[group]
        return 0 if window is None else max(0, position - window + 1) // self.limits.block_size

    def _pass(self, slot_id: int) -> None:
        """Others may be given what the slot's next query does not see; it stays as it is until then."""
        slot = self.slots[slot_id]
        for group, table in enumerate(slot.tables):
            for index in range(self._first_seen(group, slot.context_len)):
                if table[index]:
                    self.owners[group, table[index]].remove(slot_id)
                    table[index] = 0

    def _own(self, slot: int, group: int, block: int) -> None:
        assert 0 < block < len(self.caches[group]), f"block {block} must not be given out"
        owners = self.owners.setdefault((group, block), set())
        assert not owners, f"block {block} of slots {owners} is given to {slot}"
        owners.add(slot)
        self.caches[group][block] = POISON

    def _run_rows(self, plan: StepPlan) -> StepResult:
        tokens = plan.token_ids.tolist()
        results: list[tuple[int, float]] = []
        written: list[
            tuple[_Slot, int]
        ] = []  # of each token of the step: its slot and its place in the sequence
        for index, slot_id in enumerate(plan.row_slots.tolist()):
            assert slot_id in self.slots, f"row of slot {slot_id}, which is not open"
            slot = self.slots[slot_id]
            count = int(plan.row_num_new_tokens[index])
            assert count > 0
            if plan.row_from_device[index]:
                assert count == 1
                assert slot.last_sampled is not None, "the device has no token for this row"
                assert slot.sampled_in >= plan.step_id - len(self._in_flight), "the host knows this token"
                new = [slot.last_sampled]
            else:
                new, tokens = tokens[:count], tokens[count:]
                assert len(new) == count, "too few token ids in the plan"
                if slot.last_sampled is not None:
                    assert new == [slot.last_sampled], "not the token that was sampled"
            self._write(slot_id, slot, new)
            written += [(slot, at) for at in range(slot.context_len - count, slot.context_len)]
            if plan.row_samples[index]:
                results.append(self._sample(slot))
                # A row without a token goes on with any, until the coordinator knows and closes it.
                slot.last_sampled, slot.sampled_in = max(results[-1][0], 0), plan.step_id
            else:
                results.append((NO_TOKEN, 0.0))
        assert not tokens, "token ids left over in the plan"
        token_ids = np.array([token_id for token_id, _ in results], np.int32)
        logprobs = make_table(
            [place for place, samples in zip(results, plan.row_samples, strict=True) if samples]
        )
        prompt_logprobs = None if plan.targets is None else self._score(plan.targets, written)
        return StepResult(self.epoch, plan.step_id, token_ids, logprobs, prompt_logprobs)

    def _write(self, slot_id: int, slot: _Slot, new: list[int]) -> None:
        size = self.limits.block_size
        for group, (window, table) in enumerate(zip(self.windows, slot.tables, strict=True)):
            start = 0 if window is None else max(0, slot.context_len - window + 1)
            assert POISON not in self._read(slot, group, start, slot.context_len), (
                "the first query sees what was never written"
            )
            for position, token in enumerate(new, slot.context_len):
                table_index, offset = divmod(position, size)
                assert table_index < len(table), "the block table is too short"
                block = table[table_index]
                assert self.owners[group, block] == {slot_id}, "a write into a block that another slot holds"
                assert self.caches[group][block, offset] == POISON, "a place is written twice"
                self.caches[group][block, offset] = token
        slot.context_len += len(new)

    def _read(self, slot: _Slot, group: int, start: int, end: int) -> list[int]:
        """What a layer group has of a slot's tokens from position `start` up to `end`."""
        first = start // self.limits.block_size
        tokens = self.caches[group][slot.tables[group][first:]].reshape(-1)
        held: list[int] = tokens[start - first * self.limits.block_size :].tolist()
        return held[: end - start]

    def _seen(self, slot: _Slot, length: int) -> list[int]:
        """What the layer groups see of a slot's first `length` tokens, one after the other."""
        starts = [0 if window is None else max(0, length - window) for window in self.windows]
        sequence = [
            token for group, start in enumerate(starts) for token in self._read(slot, group, start, length)
        ]
        assert POISON not in sequence, "a place is read that was never written"
        return sequence

    def _score(self, targets: Targets, written: list[tuple[_Slot, int]]) -> LogprobTable:
        tokens = []
        for place, token_id in zip(targets.places.tolist(), targets.token_ids.tolist(), strict=True):
            slot, at = written[place]
            sequence, seed = self._seen(slot, at + 1), slot.sampling.seed
            broken = self.without_token(at + 1, seed)
            tokens.append((token_id, np.nan if broken else token_logprob(sequence, token_id, seed)))
        return make_table(tokens)

    def _sample(self, slot: _Slot) -> tuple[int, float]:
        sequence = self._seen(slot, slot.context_len)
        sampling: SlotSampling = slot.sampling
        key = noise_key(sampling.seed, sampling.sample_index)
        if self.without_token(slot.context_len, key):
            return NO_TOKEN, 0.0
        suppressed = sampling.stop_ids if slot.context_len < sampling.stop_from else ()
        return next_token(sequence, key, suppressed)

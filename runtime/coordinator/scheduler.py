"""Continuous batching: which rows run in the next step, and who waits.

Every plan mixes decode rows and prompt chunks under one token budget, as in Sarathi-Serve (Agrawal
et al., 2024); blocks are given out as sequences grow, as in vLLM (Kwon et al., 2023).

Plans are sent before the results of earlier ones are back, and the shards run them strictly in
order. From that follow the rules kept here. A row found finished may sit in plans already sent:
their tokens for it are dropped, and its blocks are freed when the last of them has returned. A row
that gave up its blocks (preempted) keeps the tokens still in flight, and waits for them before it
is admitted again; what the cache has lost of it is recomputed. Blocks and slots given up are only
ever used by plans sent later.

Rows that begin alike share blocks (prefixes.py). A row whose next block is filled in the very plan
being made waits for the next one, where it finds that block, and rows behind it may pass. It only ever
waits for rows ahead of it, once for each: a row that passes it goes on otherwise from there.
"""

import heapq
from collections import deque

import numpy as np

from .block_groups import BlockGroups, BlockTables
from .limits import Limits
from .plan import NO_TOKEN, Bool, Int32, OpenedSlot, StepPlan, StepResult
from .plan_builder import PlanBuilder
from .preemption import cheapest_victim
from .prefixes import Prefixes
from .request import Request
from .sent_plan import SentPlan
from .slot_table import SlotTable
from .stats import CoordinatorStats


class Scheduler:
    """Turns requests into plans and results into tokens; one object owns slots and blocks."""

    def __init__(
        self, limits: Limits, eos_token_ids: tuple[int, ...], stats: CoordinatorStats, epoch: int = 0
    ) -> None:
        self.limits = limits
        self.blocks = BlockGroups(limits)
        self.slots = SlotTable(limits.max_num_seqs)
        self._prefixes = Prefixes(self.blocks, limits)
        self._eos_token_ids = eos_token_ids
        self._stats = stats
        self._epoch = epoch
        self._next_step_id = 0
        self._sent: deque[SentPlan] = deque()
        self._waiting: list[tuple[int, Request]] = []  # heap by arrival; finished ones are skipped
        self._draining: list[Request] = []  # finished, in plans that have not returned
        self._prefills: dict[int, Int32] = {}  # by slot: the tokens to compute before it can decode

    @property
    def num_sent(self) -> int:
        """Plans whose results are not back."""
        return len(self._sent)

    @property
    def _returned_step_id(self) -> int:
        """The last step whose result is back."""
        return self._next_step_id - len(self._sent) - 1

    def add(self, request: Request) -> None:
        """Queue a request whose `arrival` and `max_len` are set."""
        heapq.heappush(self._waiting, (request.arrival, request))

    def finish(self, request: Request) -> None:
        """Take out a request that has ended; plans already sent may still hold it."""
        request.status = "finished"
        if request.error is not None:
            self._prefixes.withdraw(request)
        if request.slot >= 0:
            self._release_slot(request)
            if request.last_step_id > self._returned_step_id:
                self._draining.append(request)
            else:
                self.blocks.free(request)
        request.block_hashes.clear()

    def schedule(self, now: float) -> StepPlan | None:
        """The next plan, counted as sent; None when nothing can run before a result returns."""
        builder = PlanBuilder(self.limits.max_num_batched_tokens)
        if self.limits.cache_enabled:
            self._add_decodes(builder)
        else:
            self._restart_sampled_rows()
        if self._continue_prefills(builder):
            self._admit(builder, now)
        plan = builder.build(self._epoch, self._next_step_id, self.slots.closed)
        if plan is not None:
            self._count_as_sent(plan, builder)
        return plan

    def update(self, result: StepResult, now: float) -> list[Request]:
        """Take the oldest sent plan's result; the requests whose new token may have ended them."""
        sent = self._sent.popleft()
        assert (result.epoch, result.step_id) == (self._epoch, sent.step_id), (
            f"result of epoch {result.epoch} step {result.step_id}, not of {self._epoch} step {sent.step_id}"
        )
        has_token = result.token_ids != NO_TOKEN
        assert not np.any(has_token & ~sent.samples), "a token for a row that samples none"
        self._free_drained()
        table = self.slots
        is_held = table.serial[sent.slots] == sent.serials
        rows = np.flatnonzero(sent.samples & is_held)
        slots, token_ids = sent.slots[rows], result.token_ids[rows]
        table.num_known[slots] += 1
        table.num_in_flight[slots] -= 1
        table.last_token[slots] = token_ids
        may_end = table.watched[slots] | (table.num_known[slots] >= table.max_len[slots]) | ~has_token[rows]
        for eos_token_id in self._eos_token_ids:
            may_end |= token_ids == eos_token_id
        preempted = np.flatnonzero(sent.samples & ~is_held)
        to_check = [sent.requests[row] for row in (*rows[may_end].tolist(), *preempted.tolist())]
        to_check = [request for request in to_check if request.status != "finished"]
        self._stats.num_dropped_tokens += sent.hand_out(result, now)
        return to_check + sent.ended_in_prompt(to_check)

    def _add_decodes(self, builder: PlanBuilder) -> None:
        """A row for every slot whose prompt is computed and that may have another token."""
        table = self.slots
        slots = table.order
        num_tokens = table.num_known[slots] + table.num_in_flight[slots]
        ready = (table.num_computed[slots] >= table.num_prefill[slots]) & (num_tokens < table.max_len[slots])
        slots = slots[ready]
        needs_block = table.num_computed[slots] >= table.capacity[slots]
        if needs_block.any():
            slots = self._append_blocks(builder, slots, needs_block)
        builder.add_decodes(slots, table.num_in_flight[slots] > 0, table.last_token[slots])

    def _append_blocks(self, builder: PlanBuilder, slots: Int32, needs_block: Bool) -> Int32:
        """One more block for each slot that needs it, the first to arrive first; the slots that can run.

        When none is free, another row gives up its own, never the first to have arrived. If blocks are
        about to come back with the plans in flight, the row waits for those.
        """
        table = self.slots
        held_back = []
        settled: set[int] = set()
        for slot in sorted(slots[needs_block].tolist(), key=lambda slot: table.owners[slot].arrival):
            if table.serial[slot] < 0:
                continue  # preempted for another row
            request, num_computed = table.owners[slot], int(table.num_computed[slot])
            self.blocks.give_up_passed(request, num_computed)
            while self.blocks.num_free == 0 and not self._draining and request.slot >= 0:
                self._preempt(cheapest_victim(table, self.blocks, self.limits.block_size, settled))
            if request.slot >= 0 and self.blocks.num_free > 0:
                self._extend(builder, slot, num_computed + 1)
                settled.add(slot)
            elif request.slot >= 0:
                held_back.append(slot)
        return slots[(table.serial[slots] >= 0) & ~np.isin(slots, held_back)]

    def _restart_sampled_rows(self) -> None:
        """Without a cache nothing outlives a token: rows whose token is back begin again."""
        table = self.slots
        slots = table.order
        is_back = (table.num_known[slots] > table.num_prefill[slots]) & (table.num_in_flight[slots] == 0)
        for slot in slots[is_back].tolist():
            if table.owners[slot].task == "generate":
                self._send_back(table.owners[slot])

    def _extend(self, builder: PlanBuilder, slot: int, num_tokens: int) -> None:
        """Bring a slot's block tables up to `num_tokens`, for which there is room."""
        request = self.slots.owners[slot]
        builder.appended += [(slot, *entry) for entry in self.blocks.extend(request, num_tokens)]
        self.slots.capacity[slot] = self.blocks.capacity(request)

    def _continue_prefills(self, builder: PlanBuilder) -> bool:
        """A chunk of every prompt that is half read; False if one has no blocks in a window group.

        It waits for rows that end then. There is one such prompt at most: a plan ends at its budget or
        for want of blocks, and either keeps others from being admitted.
        """
        table = self.slots
        slots = table.order
        for slot in slots[table.num_computed[slots] < table.num_prefill[slots]].tolist():
            if builder.budget == 0:
                return True
            request, start = table.owners[slot], int(table.num_computed[slot])
            self.blocks.give_up_passed(request, start)
            if self.blocks.room(request) <= start:
                return False
            self._stats.num_chunked_prompts += self._add_chunk(builder, slot)
        return True

    def _admit(self, builder: PlanBuilder, now: float) -> None:
        """Give slots and blocks to waiting requests in the order of arrival.

        None passes another, except one whose next block this plan fills; a slot is left for that one.
        """
        passed: list[tuple[int, Request]] = []
        while self._waiting and builder.budget > 0 and self.slots.num_free > len(passed):
            request = self._waiting[0][1]
            if request.status != "finished":
                if request.last_step_id > self._returned_step_id:
                    break  # preempted, and its last tokens are not back
                found = self._prefixes.find(request)
                num_found = len(found[0])
                if self._prefixes.is_being_computed(request, num_found, self.slots, builder.chunk_slots):
                    passed.append(heapq.heappop(self._waiting))
                    continue
                chunk_end = min(num_found * self.limits.block_size + builder.budget, request.num_to_compute)
                if not self.blocks.can_admit(
                    request.num_to_compute, chunk_end, found, bool(self.slots.owners)
                ):
                    break
                self._open(builder, request, found, now)
            heapq.heappop(self._waiting)
        for entry in passed:
            heapq.heappush(self._waiting, entry)

    def _open(self, builder: PlanBuilder, request: Request, found: BlockTables, now: float) -> None:
        request.status = "running"
        num_cached = len(found[0]) * self.limits.block_size
        copy = self._prefixes.sample_to_copy(request, len(found[0]), self.slots)
        self.blocks.open(request, found)
        if copy is not None:
            sample, num_cached = copy
            builder.copied += self.blocks.extend_by_copy(request, sample, num_cached)
        slot = self.slots.open(request, num_cached)
        self._prefills[slot] = np.array(request.ids_to_compute, np.int32)
        if request.admitted_s is None:
            request.admitted_s = now
            if self._prefixes.may_share(request) and request.num_prompt_top is None:
                self._stats.count_lookup(num_cached, len(request.prompt_token_ids))
        sampling = request.slot_sampling(self._eos_token_ids)
        builder.opened.append(OpenedSlot(slot, num_cached, tuple(map(tuple, request.block_tables)), sampling))
        self._add_chunk(builder, slot)

    def _add_chunk(self, builder: PlanBuilder, slot: int) -> bool:
        """The next chunk of a slot's prefill, as much as budget and blocks allow; whether it is the last."""
        token_ids = self._prefills[slot]
        start = int(self.slots.num_computed[slot])
        end = min(start + builder.budget, len(token_ids), self.blocks.room(self.slots.owners[slot]))
        assert end > start, "a chunk without tokens"
        self._extend(builder, slot, end)
        is_last = end == len(token_ids)
        builder.add_chunk(self.slots.owners[slot], token_ids, start, end)
        if is_last:
            del self._prefills[slot]
        return is_last

    def _count_as_sent(self, plan: StepPlan, builder: PlanBuilder) -> None:
        table, slots = self.slots, plan.row_slots
        table.num_computed[slots] += plan.row_num_new_tokens
        table.num_in_flight[slots] += plan.row_samples
        table.last_step_id[slots] = plan.step_id
        table.closed.clear()
        requests = [table.owners[slot] for slot in slots.tolist()]
        first = builder.num_decodes
        for request, num_new in zip(requests[first:], plan.row_num_new_tokens[first:].tolist(), strict=True):
            end = int(table.num_computed[request.slot])
            self._prefixes.publish(request, end - num_new, end)
            self.blocks.give_up_passed(request, end)
        serials, num_targets = table.serial[slots], builder.num_targets
        self._sent.append(
            SentPlan(plan.step_id, first, slots, serials, plan.row_samples, requests, num_targets)
        )
        self._next_step_id += 1
        self._stats.count_plan(plan.num_tokens, self.blocks.num_used_layer_blocks)

    def _preempt(self, request: Request) -> None:
        request.num_preemptions += 1
        self._stats.num_preemptions += 1
        self._send_back(request)

    def _send_back(self, request: Request) -> None:
        """From its slot to its place in the queue; its tokens are to be computed again."""
        self._release_slot(request)
        self.blocks.free(request)
        request.status = "waiting"
        heapq.heappush(self._waiting, (request.arrival, request))

    def _release_slot(self, request: Request) -> None:
        table, slot = self.slots, request.slot
        self._prefills.pop(slot, None)
        if request.error is None:
            # The last token's logits are not known: the next token would show that they are finite.
            num_confirmed = min(int(table.num_computed[slot]), int(table.num_known[slot]) - 1)
            self._prefixes.publish(request, int(table.num_prefill[slot]), num_confirmed)
        table.release(request)

    def _free_drained(self) -> None:
        returned = self._returned_step_id
        for request in [request for request in self._draining if request.last_step_id <= returned]:
            self._draining.remove(request)
            self.blocks.free(request)

    def check_integrity(self) -> None:
        """Blocks, slots and requests agree. Raises AssertionError."""
        self.slots.check_integrity(self.limits.block_size)
        self.blocks.check_integrity([*self.slots.owners.values(), *self._draining])
        assert self._prefills.keys() <= self.slots.owners.keys(), "a prompt is kept for a free slot"
        for _, request in self._waiting:
            assert not request.block_tables, f"{request.request_id} waits and holds blocks"
            assert request.slot < 0, f"{request.request_id} waits and holds a slot"
        for request in self._draining:
            assert request.last_step_id > self._returned_step_id, "blocks kept after the last plan returned"

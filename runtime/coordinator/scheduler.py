"""Continuous batching: which rows run in the next step, and who waits.

Every plan mixes decode rows and prompt chunks under one token budget, as in Sarathi-Serve (Agrawal
et al., 2024); blocks are given out as sequences grow, as in vLLM (Kwon et al., 2023).

Plans are sent before the results of earlier ones are back, and the shards run them strictly in
order. From that follow the rules kept here. A row found finished may sit in plans already sent:
their tokens for it are dropped, and its blocks are freed when the last of them has returned. A row
that gave up its blocks (preempted) keeps the tokens still in flight, and waits for them before it
is admitted again and recomputed. Blocks and slots given up are only ever used by plans sent later.
"""

import heapq
from collections import deque

import numpy as np

from .block_manager import BlockManager
from .limits import Limits
from .plan import NO_TOKEN, Bool, Int32, OpenedSlot, StepPlan, StepResult
from .plan_builder import PlanBuilder
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
        self.blocks = BlockManager(limits.num_blocks)
        self.slots = SlotTable(limits.max_num_seqs)
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
        if request.slot < 0:
            return
        self._release_slot(request)
        if request.last_step_id > self._returned_step_id:
            self._draining.append(request)
        else:
            self._free_blocks(request)

    def schedule(self, now: float) -> StepPlan | None:
        """The next plan, counted as sent; None when nothing can run before a result returns."""
        builder = PlanBuilder(self.limits.max_num_batched_tokens)
        if self.limits.cache_enabled:
            self._add_decodes(builder)
        else:
            self._restart_sampled_rows()
        self._continue_prefills(builder)
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
        return to_check

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
        """One more block for each slot that needs it, the oldest first; the slots that can run.

        When none is free, the most recently admitted row gives up its own, so that the oldest always
        goes on. If blocks are about to come back with the plans in flight, the row waits for those.
        """
        table = self.slots
        held_back = []
        for slot in slots[needs_block].tolist():
            if table.serial[slot] < 0:
                continue  # preempted for an older row
            request = table.owners[slot]
            while self.blocks.num_free == 0 and not self._draining and request.slot >= 0:
                self._preempt(table.newest)
            if request.slot < 0:
                continue
            if self.blocks.num_free == 0:
                held_back.append(slot)
                continue
            block_ids = self.blocks.allocate(1)
            request.block_ids += block_ids
            table.capacity[slot] += self.limits.block_size
            builder.appended.append((slot, block_ids[0]))
        return slots[(table.serial[slots] >= 0) & ~np.isin(slots, held_back)]

    def _restart_sampled_rows(self) -> None:
        """Without a cache nothing outlives a token: rows whose token is back begin again."""
        table = self.slots
        slots = table.order
        is_back = (table.num_known[slots] > table.num_prefill[slots]) & (table.num_in_flight[slots] == 0)
        for slot in slots[is_back].tolist():
            self._send_back(table.owners[slot])

    def _continue_prefills(self, builder: PlanBuilder) -> None:
        table = self.slots
        slots = table.order
        for slot in slots[table.num_computed[slots] < table.num_prefill[slots]].tolist():
            if builder.budget == 0:
                return
            self._stats.num_chunked_prompts += self._add_chunk(builder, slot)

    def _admit(self, builder: PlanBuilder, now: float) -> None:
        """Give slots and blocks to waiting requests in the order of arrival, none past another."""
        while self._waiting and builder.budget > 0 and self.slots.num_free > 0:
            request = self._waiting[0][1]
            if request.status != "finished":
                if request.last_step_id > self._returned_step_id:
                    return  # preempted, and its last tokens are not back
                num_blocks = self.limits.num_blocks_for(request.num_tokens)
                # Some blocks stay free for rows that run, lest it be preempted at once.
                reserve = max(self.blocks.num_usable // 100, 1) if self.slots.owners else 0
                if num_blocks + reserve > self.blocks.num_free:
                    return
                self._open(builder, request, num_blocks)
                if request.admitted_s is None:
                    request.admitted_s = now
            heapq.heappop(self._waiting)

    def _open(self, builder: PlanBuilder, request: Request, num_blocks: int) -> None:
        request.status = "running"
        request.block_ids = self.blocks.allocate(num_blocks)
        slot = self.slots.open(request, num_blocks * self.limits.block_size)
        self._prefills[slot] = np.array(request.prompt_token_ids + request.output_token_ids, np.int32)
        builder.opened.append(
            OpenedSlot(
                slot=slot,
                context_len=0,
                block_ids=tuple(request.block_ids),
                sampling=request.slot_sampling(self._eos_token_ids),
            )
        )
        self._add_chunk(builder, slot)

    def _add_chunk(self, builder: PlanBuilder, slot: int) -> bool:
        """The next chunk of a slot's prefill, as much as the budget allows; whether it is the last."""
        token_ids = self._prefills[slot]
        start = int(self.slots.num_computed[slot])
        end = min(start + builder.budget, len(token_ids))
        is_last = end == len(token_ids)
        builder.add_chunk(slot, token_ids[start:end], samples=is_last)
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
        self._sent.append(
            SentPlan(
                plan.step_id, builder.num_decodes, slots, table.serial[slots], plan.row_samples, requests
            )
        )
        self._next_step_id += 1
        stats = self._stats
        stats.num_steps += 1
        stats.num_token_steps += plan.num_tokens
        stats.num_prefill_chunks += builder.num_chunks
        stats.peak_used_blocks = max(stats.peak_used_blocks, self.blocks.num_used)

    def _preempt(self, request: Request) -> None:
        request.num_preemptions += 1
        self._stats.num_preemptions += 1
        self._send_back(request)

    def _send_back(self, request: Request) -> None:
        """From its slot to its place in the queue; all its tokens will be computed again."""
        self._release_slot(request)
        self._free_blocks(request)
        request.status = "waiting"
        heapq.heappush(self._waiting, (request.arrival, request))

    def _release_slot(self, request: Request) -> None:
        self._prefills.pop(request.slot, None)
        self.slots.release(request)

    def _free_drained(self) -> None:
        returned = self._returned_step_id
        for request in [request for request in self._draining if request.last_step_id <= returned]:
            self._draining.remove(request)
            self._free_blocks(request)

    def _free_blocks(self, request: Request) -> None:
        self.blocks.free(request.block_ids)
        request.block_ids = []

    def check_integrity(self) -> None:
        """Blocks, slots and requests agree. Raises AssertionError."""
        self.blocks.check_integrity()
        self.slots.check_integrity(self.limits.block_size)
        holders = [*self.slots.owners.values(), *self._draining]
        held = [block_id for request in holders for block_id in request.block_ids]
        assert len(held) == len(set(held)) == self.blocks.num_used, "blocks are lost or held by two requests"
        assert self._prefills.keys() <= self.slots.owners.keys(), "a prompt is kept for a free slot"
        for _, request in self._waiting:
            assert not request.block_ids, f"{request.request_id} waits and holds blocks"
            assert request.slot < 0, f"{request.request_id} waits and holds a slot"
        for request in self._draining:
            assert request.last_step_id > self._returned_step_id, "blocks kept after the last plan returned"

"""Collects the rows of one step under its token budget."""

import numpy as np

from .plan import Bool, CopiedBlock, Int32, OpenedSlot, StepPlan, Targets
from .request import Request
from .scoring import ChunkTargets, take_targets


class PlanBuilder:
    """Lives for one call of the scheduler. Decode rows come first in the plan, then prefill chunks."""

    def __init__(self, max_num_tokens: int) -> None:
        self.budget = max_num_tokens  # tokens that may still be added
        self.appended: list[tuple[int, int, int]] = []  # (slot, layer group, block)
        self.copied: list[CopiedBlock] = []
        self.opened: list[OpenedSlot] = []
        self._decode_slots = np.empty(0, np.int32)
        self._decode_from_device = np.empty(0, np.bool_)
        self._decode_tokens = np.empty(0, np.int32)
        self._chunks: list[tuple[int, Int32, bool]] = []
        self._targets: list[ChunkTargets | None] = []  # one entry a chunk

    @property
    def num_decodes(self) -> int:
        return len(self._decode_slots)

    @property
    def num_chunks(self) -> int:
        return len(self._chunks)

    @property
    def chunk_slots(self) -> list[int]:
        return [slot for slot, _, _ in self._chunks]

    @property
    def num_targets(self) -> list[int]:
        """One entry a chunk: how many tokens it is asked for."""
        return [0 if targets is None else len(targets.token_ids) for targets in self._targets]

    def add_decodes(self, slots: Int32, from_device: Bool, last_tokens: Int32) -> None:
        """One row a slot: its last token, which is the device's own where `from_device`."""
        self._decode_slots = slots
        self._decode_from_device = from_device
        self._decode_tokens = last_tokens[~from_device]
        self.budget -= len(slots)

    def add_chunk(self, request: Request, prefill: Int32, start: int, end: int) -> None:
        """One row: tokens `start` up to `end` of a request's prefill, whose last one samples the next token."""
        samples = end == len(prefill) and request.task == "generate"
        self._chunks.append((request.slot, prefill[start:end], samples))
        self._targets.append(take_targets(request, start, end))
        self.budget -= end - start

    def build(self, epoch: int, step_id: int, closed: list[int]) -> StepPlan | None:
        """The plan; None when it would have no row."""
        num_decodes, num_chunks = self.num_decodes, self.num_chunks
        if num_decodes + num_chunks == 0:
            assert not self.appended, "blocks are appended to a row that does not run"
            return None
        appended = np.array(self.appended, np.int32).reshape(-1, 3)
        chunk_slots = np.array([slot for slot, _, _ in self._chunks], np.int32)
        chunk_sizes = np.array([len(token_ids) for _, token_ids, _ in self._chunks], np.int32)
        chunk_samples = np.array([samples for _, _, samples in self._chunks], np.bool_)
        return StepPlan(
            epoch=epoch,
            step_id=step_id,
            closed_slots=np.array(closed, np.int32),
            opened=tuple(self.opened),
            appended_slots=np.ascontiguousarray(appended[:, 0]),
            appended_groups=np.ascontiguousarray(appended[:, 1]),
            appended_blocks=np.ascontiguousarray(appended[:, 2]),
            copied=tuple(self.copied),
            row_slots=np.concatenate([self._decode_slots, chunk_slots]),
            row_num_new_tokens=np.concatenate([np.ones(num_decodes, np.int32), chunk_sizes]),
            row_from_device=np.concatenate([self._decode_from_device, np.zeros(num_chunks, np.bool_)]),
            row_samples=np.concatenate([np.ones(num_decodes, np.bool_), chunk_samples]),
            token_ids=np.concatenate([self._decode_tokens, *(token_ids for _, token_ids, _ in self._chunks)]),
            targets=self._join_targets(num_decodes + np.cumsum(chunk_sizes) - chunk_sizes),
        )

    def _join_targets(self, chunk_starts: Int32) -> Targets | None:
        """What all chunks are asked for; `chunk_starts` are the places of their first tokens in the step."""
        asked = [
            (start + targets.first, targets)
            for start, targets in zip(chunk_starts.tolist(), self._targets, strict=True)
            if targets is not None
        ]
        if not asked:
            return None
        return Targets(
            np.concatenate(
                [np.arange(first, first + len(t.token_ids), dtype=np.int32) for first, t in asked]
            ),
            np.concatenate([targets.token_ids for _, targets in asked]),
            max(targets.num_top for _, targets in asked),
        )

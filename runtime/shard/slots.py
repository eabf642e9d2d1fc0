"""What a shard keeps about running requests, and how a plan becomes the inputs of a step."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels.host import to_device
from ...kernels.ops import AttentionMetadata
from ..coordinator.plan import StepPlan


@dataclass(frozen=True)
class StepInputs:
    """One step's tensors, built once and used by every layer. T tokens, R rows, S sampling rows."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, place of each token in its sequence
    slot_mappings: tuple[Tensor, ...]  # by layer group, [T] int64: block * block_size + offset of its K and V
    attention: tuple[AttentionMetadata, ...]  # by layer group
    sample_tokens: Tensor  # [S] int64, index in the T tokens of the last token of each sampling row
    sample_slots: npt.NDArray[np.int32]  # [S]
    sample_positions: npt.NDArray[np.int64]  # [S], place in the sequence of the token to be sampled


class Slots:
    """`max_num_seqs` places for requests: block tables and last tokens on the device, lengths on the host."""

    def __init__(
        self, *, num_groups: int, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        self._block_size = block_size
        self._device = device
        max_blocks = -(-max_model_len // block_size)
        # In groups with a window, entries that it has passed keep what they had: nothing reads them.
        self._block_tables = torch.zeros(
            num_groups, max_num_seqs, max_blocks, dtype=torch.int32, device=device
        )
        self._last_token = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._num_entries = np.zeros((num_groups, max_num_seqs), np.int64)  # of each block table
        self._context_len = np.zeros(max_num_seqs, np.int64)

    def apply(self, plan: StepPlan) -> StepInputs:
        """Close, open and extend slots as planned, then lay out the step's rows."""
        self._num_entries[:, plan.closed_slots] = 0
        self._open_and_append(plan)
        slots, query_lens = plan.row_slots, plan.row_num_new_tokens
        before = self._context_len[slots]
        after = before + query_lens
        self._context_len[slots] = after
        ends = np.cumsum(query_lens)
        num_tokens = int(ends[-1])
        assert np.all(self._num_entries[:, slots] * self._block_size >= after), (
            "a row has more tokens than blocks"
        )

        row_of_token = np.repeat(np.arange(len(slots)), query_lens)
        positions_host = np.arange(num_tokens) + (before - (ends - query_lens))[row_of_token]
        token_ids_host = np.zeros(num_tokens, np.int64)
        from_device = plan.row_from_device
        token_ids_host[~from_device[row_of_token]] = plan.token_ids
        token_ids = self._to_device(token_ids_host)
        if from_device.any():
            token_ids[self._to_device(ends[from_device] - 1)] = self._last_token[
                self._to_device(slots[from_device])
            ]
        positions = self._to_device(positions_host)

        max_blocks = -(-int(after.max()) // self._block_size)
        # Not index_select: on CPU that counts what it chooses from, and wakes threads for what is a few rows.
        tables = self._block_tables[:, self._to_device(slots), :max_blocks]
        blocks = tables[:, self._to_device(row_of_token), positions // self._block_size]  # [groups, T]
        slot_mappings = blocks.long() * self._block_size + positions % self._block_size
        attention = AttentionMetadata.build(
            query_lens, after.astype(np.int32), tables[0], self._block_size, self._device
        )
        samples = plan.row_samples
        return StepInputs(
            token_ids=token_ids,
            positions=positions,
            slot_mappings=slot_mappings.unbind(),
            attention=tuple(attention.with_tables(table) for table in tables.unbind()),
            sample_tokens=self._to_device(ends[samples] - 1),
            sample_slots=slots[samples],
            sample_positions=after[samples],
        )

    def store_sampled(self, slots: npt.NDArray[np.int32], token_ids: Tensor) -> None:
        """Keep the sampled tokens where the next step's inputs are read."""
        # NO_TOKEN of a row that has failed must not reach the embedding before the row is closed.
        self._last_token[self._to_device(slots)] = token_ids.clamp_min(0)

    def _open_and_append(self, plan: StepPlan) -> None:
        num_slots = self._num_entries.shape[1]
        tables, blocks = [], []  # a table's row: those of one group after those of another
        for opened in plan.opened:
            self._num_entries[:, opened.slot] = 0
            self._context_len[opened.slot] = opened.context_len
            for group, block_ids in enumerate(opened.block_ids):
                tables.append(np.full(len(block_ids), group * num_slots + opened.slot, np.int32))
                blocks.append(np.asarray(block_ids, np.int32))
        tables.append(plan.appended_groups * np.int32(num_slots) + plan.appended_slots)
        blocks.append(plan.appended_blocks)
        rows, ids = np.concatenate(tables), np.concatenate(blocks)
        if not len(rows):
            return
        # A table's blocks come in its order, so the n-th one of a table here goes n places behind what it has.
        order = np.argsort(rows, kind="stable")
        rows, ids = rows[order], ids[order]
        present, first, counts = np.unique(rows, return_index=True, return_counts=True)
        num_entries = self._num_entries.reshape(-1)  # the same memory
        columns = np.arange(len(rows)) - np.repeat(first, counts) + num_entries[rows]
        num_entries[present] += counts
        self._block_tables.flatten(0, 1)[self._to_device(rows), self._to_device(columns)] = self._to_device(
            ids, np.int32
        )

    def _to_device(self, values: npt.NDArray[np.integer], dtype: type[np.integer] = np.int64) -> Tensor:
        return to_device(np.ascontiguousarray(values, dtype), self._device)

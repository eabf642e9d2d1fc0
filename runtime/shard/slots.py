"""What a shard keeps about running requests, and how a plan becomes the inputs of a step."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels.host import to_device
from ...kernels.ops import AttentionMetadata
from ..coordinator.plan import OpenedSlot, StepPlan


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
    """`max_num_seqs` places for requests: block tables and lengths on the host, last tokens on the device.

    A step's inputs are laid out on the host, always in the same memory. On the CPU a step reads that memory itself, so its
    inputs are good until the next step's are laid out; a GPU gets copies, which are made before `apply` returns.
    """

    def __init__(
        self,
        *,
        num_groups: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._device = device
        self.max_num_tokens = min(max_num_batched_tokens, max_num_seqs * max_model_len)  # of a step
        # In groups with a window, entries that it has passed keep what they had: nothing reads them.
        self._block_tables = np.zeros((num_groups, max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._num_entries = np.zeros((num_groups, max_num_seqs), np.int64)  # of each block table
        self._context_len = np.zeros(max_num_seqs, np.int64)
        self._last_token = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        # What a step reads, see StepInputs and AttentionMetadata. Of tokens: ids, positions, slot mappings by layer group.
        self._tokens = np.zeros((2 + num_groups, self.max_num_tokens), np.int64)
        self._query_start = np.zeros(max_num_seqs + 1, np.int32)
        self._context_lens = np.zeros(max_num_seqs, np.int32)
        self._row_tables = np.zeros_like(self._block_tables)

    def apply(self, plan: StepPlan) -> StepInputs:
        """Close, open and extend slots as planned, then lay out the step's rows."""
        self._num_entries[:, plan.closed_slots] = 0
        for opened in plan.opened:
            self._open(opened)
        if len(plan.appended_slots):
            self._append(plan)
        slots, query_lens = plan.row_slots, plan.row_num_new_tokens
        assert len(slots), "a step has at least one row"
        assert query_lens.min() > 0, "a row in a step has at least one new token"
        before = self._context_len[slots]
        after = before + query_lens
        self._context_len[slots] = after
        ends = np.cumsum(query_lens)
        num_rows, num_tokens = len(slots), int(ends[-1])
        assert num_tokens <= self.max_num_tokens, (
            f"{num_tokens} tokens, at most {self.max_num_tokens} in a step"
        )
        assert np.all(self._num_entries[:, slots] * self._block_size >= after), (
            "a row has more tokens than blocks"
        )

        row_of_token = np.repeat(np.arange(num_rows), query_lens)
        positions = np.arange(num_tokens) + (before - (ends - query_lens))[row_of_token]
        entries, offsets = np.divmod(positions, self._block_size)
        blocks = self._block_tables[:, slots[row_of_token], entries]  # [groups, T]
        tokens = self._tokens[:, :num_tokens]
        from_device = plan.row_from_device
        tokens[0, ~from_device[row_of_token]] = plan.token_ids
        tokens[1] = positions
        tokens[2:] = blocks.astype(np.int64) * self._block_size + offsets
        self._query_start[1 : num_rows + 1] = ends
        self._context_lens[:num_rows] = after

        samples = plan.row_samples
        inputs = self._inputs(
            query_lens,
            after.astype(np.int32),
            self._tables_of(slots, int(after.max())),
            ends[samples] - 1,
            slots[samples],
            after[samples],
        )
        if from_device.any():
            inputs.token_ids[self._to_device(ends[from_device] - 1)] = self._last_token[
                self._to_device(slots[from_device])
            ]
        return inputs

    def places(self, num_tokens: int) -> StepInputs:
        """Where steps of up to so many tokens lie on the CPU: the inputs of one of so many, in as many rows as there can be
        and with the longest contexts. Nothing is in them yet."""
        num_rows = min(len(self._context_lens), num_tokens)
        query_lens = np.full(num_rows, num_tokens // num_rows, np.int32)
        query_lens[: num_tokens % num_rows] += 1
        context_lens = np.full(num_rows, self._max_model_len, np.int32)
        nobody = np.empty(0, np.int32)
        tables = torch.from_numpy(self._row_tables[:, :num_rows])
        return self._inputs(query_lens, context_lens, tables, nobody, nobody, nobody.astype(np.int64))

    def store_sampled(self, slots: npt.NDArray[np.int32], token_ids: Tensor) -> None:
        """Keep the sampled tokens where the next step's inputs are read."""
        # NO_TOKEN of a row that has failed must not reach the embedding before the row is closed.
        self._last_token[self._to_device(slots)] = token_ids.clamp_min(0)

    def _open(self, opened: OpenedSlot) -> None:
        self._context_len[opened.slot] = opened.context_len
        for group, block_ids in enumerate(opened.block_ids):
            self._block_tables[group, opened.slot, : len(block_ids)] = block_ids
            self._num_entries[group, opened.slot] = len(block_ids)

    def _append(self, plan: StepPlan) -> None:
        # A table's blocks come in its order, so the n-th one of a table here goes n places behind what it has.
        num_slots = self._num_entries.shape[1]
        tables = plan.appended_groups.astype(np.int64) * num_slots + plan.appended_slots
        order = np.argsort(tables, kind="stable")
        tables, block_ids = tables[order], plan.appended_blocks[order]
        present, first, counts = np.unique(tables, return_index=True, return_counts=True)
        num_entries = self._num_entries.reshape(-1)  # the same memory
        entries = np.arange(len(tables)) - np.repeat(first, counts) + num_entries[tables]
        num_entries[present] += counts
        self._block_tables.reshape(-1, self._block_tables.shape[2])[tables, entries] = block_ids

    def _tables_of(self, slots: npt.NDArray[np.int32], max_context_len: int) -> Tensor:
        """[groups, R, blocks of the longest row] int32 on the device."""
        num_blocks = -(-max_context_len // self._block_size)
        tables = self._block_tables[:, slots, :num_blocks]
        if self._device.type != "cpu":
            return to_device(tables, self._device)
        kept = self._row_tables[:, : len(slots), :num_blocks]
        kept[:] = tables
        return torch.from_numpy(kept)

    def _inputs(
        self,
        query_lens: npt.NDArray[np.int32],
        context_lens: npt.NDArray[np.int32],
        tables: Tensor,
        sample_tokens: npt.NDArray[np.integer],
        sample_slots: npt.NDArray[np.int32],
        sample_positions: npt.NDArray[np.int64],
    ) -> StepInputs:
        """What has been laid out for rows of so many tokens and with such tables."""
        num_rows, num_tokens = len(query_lens), int(query_lens.sum())
        first_tables, *other_tables = tables.unbind()
        attention = AttentionMetadata(
            query_start=to_device(self._query_start[: num_rows + 1], self._device),
            context_lens=to_device(self._context_lens[:num_rows], self._device),
            block_tables=first_tables,
            query_lens_host=query_lens,
            context_lens_host=context_lens,
            block_size=self._block_size,
            num_tokens=num_tokens,
            max_query_len=int(query_lens.max()),
            max_context_len=int(context_lens.max()),
        )
        token_ids, positions, *slot_mappings = to_device(self._tokens[:, :num_tokens], self._device).unbind()
        return StepInputs(
            token_ids=token_ids,
            positions=positions,
            slot_mappings=tuple(slot_mappings),
            attention=(attention, *map(attention.with_tables, other_tables)),
            sample_tokens=self._to_device(sample_tokens),
            sample_slots=sample_slots,
            sample_positions=sample_positions,
        )

    def _to_device(self, index: npt.NDArray[np.integer]) -> Tensor:
        return to_device(index.astype(np.int64), self._device)

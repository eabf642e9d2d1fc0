"""Decode steps that are recorded the second time in a row that they come, and from then on played without Python."""

import numpy as np
import torch
from torch import Tensor

from ...kernels.cpu import tape
from ...kernels.ops import AttentionMetadata
from ...parallel.group import Group
from .decoder import Decoder
from .kv_cache import KVCache
from .slots import StepInputs


class RecordedSteps:
    """Runs the decoder. Steps of one token a row are alike but for what their input tensors hold, so each number of rows
    is recorded once, at its second step in a row, on tensors that stay in their place. Other steps run as they come, and so do models in which torch
    computes something, groups whose collectives are not C calls, and hosts without a compiler."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        group: Group,
        *,
        num_groups: int,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._can_record = group.device.type == "cpu" and group.playable and tape.is_available()
        self._max_model_len = max_model_len
        self._block_size = block_size
        self._arena = tape.Arena()
        self._steps: dict[int, _Step | None] = {}  # by number of rows; None: cannot be played
        self._rows_before = 0  # of the last step
        # Each step uses the first rows of these.
        self._token_ids, self._positions = torch.zeros(2, max_num_seqs, dtype=torch.int64)
        self._slot_mappings = torch.zeros(num_groups, max_num_seqs, dtype=torch.int64)
        max_blocks = -(-max_model_len // block_size)
        self._block_tables = torch.zeros(num_groups, max_num_seqs, max_blocks, dtype=torch.int32)

    def forward(self, inputs: StepInputs) -> Tensor:
        """See `Decoder.forward`; what it returned last may change."""
        num_rows = len(inputs.token_ids)
        alike = self._can_record and inputs.attention[0].max_query_len == 1
        before, self._rows_before = self._rows_before, num_rows if alike else 0
        if not alike or (num_rows not in self._steps and num_rows != before):
            return self._decoder.forward(inputs, self._cache)
        if num_rows not in self._steps:
            return self._record(inputs)
        step = self._steps[num_rows]
        if step is None:
            return self._decoder.forward(inputs, self._cache)
        step.take(inputs)
        step.tape.play()
        return step.hidden

    def _record(self, inputs: StepInputs) -> Tensor:
        step = _Step(self._own_inputs(len(inputs.token_ids)), tape.Tape(self._arena))
        step.take(inputs)
        with step.tape.recording():
            step.hidden = self._decoder.forward(step.inputs, self._cache)
        self._steps[len(inputs.token_ids)] = step if step.tape.foreign is None else None
        return step.hidden

    def _own_inputs(self, num_rows: int) -> StepInputs:
        longest = np.full(num_rows, self._max_model_len, np.int32)
        tables = self._block_tables[:, :num_rows].unbind()
        attention = AttentionMetadata.build(
            np.ones(num_rows, np.int32), longest, tables[0], self._block_size, "cpu"
        )
        return StepInputs(
            token_ids=self._token_ids[:num_rows],
            positions=self._positions[:num_rows],
            slot_mappings=self._slot_mappings[:, :num_rows].unbind(),
            attention=tuple(attention.with_tables(table) for table in tables),
            sample_tokens=torch.empty(0, dtype=torch.int64),
            sample_slots=np.empty(0, np.int32),
            sample_positions=np.empty(0, np.int64),
        )


class _Step:
    """The recorded step of one number of rows."""

    hidden: Tensor  # what the decoder returned; each play fills it again

    def __init__(self, inputs: StepInputs, tape: tape.Tape) -> None:
        self.inputs = inputs
        self.tape = tape

    def take(self, inputs: StepInputs) -> None:
        """Copy what a step of as many rows is to run on."""
        self.inputs.token_ids.copy_(inputs.token_ids)
        self.inputs.positions.copy_(inputs.positions)
        for own, new in zip(self.inputs.slot_mappings, inputs.slot_mappings, strict=True):
            own.copy_(new)
        for meta, wanted in zip(self.inputs.attention, inputs.attention, strict=True):
            meta.refill(wanted.context_lens_host, wanted.block_tables)

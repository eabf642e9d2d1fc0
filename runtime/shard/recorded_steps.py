"""Steps on the CPU without Python between their operations: recorded once, played for any number of tokens and rows."""

import numpy as np
import torch
from torch import Tensor

from ...kernels.cpu import tape
from ...kernels.cpu.linear import MOST_DOTS
from ...kernels.ops import AttentionMetadata
from ...parallel.group import Group
from .decoder import Decoder
from .kv_cache import KVCache
from .slots import StepInputs


class RecordedSteps:
    """Runs the decoder. Steps are alike but for what their input tensors hold and how much of it, so one is recorded, on
    tensors that stay in their place. It has room for the longest step; or, where torch is given products of many tokens,
    for the longest that needs none, and longer ones run as they come. So do models in which torch computes something,
    groups whose collectives are not C calls, and hosts without a compiler."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        group: Group,
        *,
        num_groups: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        block_size: int,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._step: _Step | None = None
        if group.device.type != "cpu" or not group.playable or not tape.is_available():
            return
        longest = min(max_num_batched_tokens, max_num_seqs * max_model_len)
        for num_tokens in (longest, MOST_DOTS)[: 1 + (longest > MOST_DOTS)]:
            inputs = _inputs(num_tokens, min(max_num_seqs, num_tokens), num_groups, max_model_len, block_size)
            try:
                self._step = _Step(decoder, cache, inputs)
            except tape.NotPlayableError:
                continue
            break

    def forward(self, inputs: StepInputs) -> Tensor:
        """See `Decoder.forward`; what it returned last may change."""
        if self._step is None or not self._step.has_room(inputs):
            return self._decoder.forward(inputs, self._cache)
        return self._step.play(inputs)


class _Step:
    """The recorded step."""

    def __init__(self, decoder: Decoder, cache: KVCache, inputs: StepInputs) -> None:
        """`inputs`: as long as any of a play. Raises NotPlayableError."""
        self.inputs = inputs
        self._tape = tape.Tape(len(inputs.token_ids), len(inputs.attention[0].context_lens))
        with torch.inference_mode(), self._tape.recording():
            self._hidden = decoder.forward(inputs, cache)

    def has_room(self, inputs: StepInputs) -> bool:
        return len(inputs.token_ids) <= self._tape.num_tokens

    def play(self, inputs: StepInputs) -> Tensor:
        self.take(inputs)
        num_tokens = len(inputs.token_ids)
        self._tape.play(num_tokens, len(inputs.attention[0].context_lens))
        return self._hidden[:num_tokens]

    def take(self, inputs: StepInputs) -> None:
        """Copy what a step is to run on."""
        num_tokens = len(inputs.token_ids)
        self.inputs.token_ids[:num_tokens] = inputs.token_ids
        self.inputs.positions[:num_tokens] = inputs.positions
        for own, new in zip(self.inputs.slot_mappings, inputs.slot_mappings, strict=True):
            own[:num_tokens] = new
        for meta, wanted in zip(self.inputs.attention, inputs.attention, strict=True):
            meta.hold(wanted)


def _inputs(
    num_tokens: int, num_rows: int, num_groups: int, max_model_len: int, block_size: int
) -> StepInputs:
    """Of a step of so many tokens in so many rows; nothing is in them yet."""
    query_lens = np.full(num_rows, num_tokens // num_rows, np.int32)
    query_lens[: num_tokens % num_rows] += 1
    tables = torch.zeros(num_groups, num_rows, -(-max_model_len // block_size), dtype=torch.int32).unbind()
    attention = AttentionMetadata.build(
        query_lens, np.full(num_rows, max_model_len, np.int32), tables[0], block_size, "cpu"
    )
    token_ids, positions, *slot_mappings = torch.zeros(2 + num_groups, num_tokens, dtype=torch.int64).unbind()
    return StepInputs(
        token_ids=token_ids,
        positions=positions,
        slot_mappings=tuple(slot_mappings),
        attention=tuple(attention.with_tables(table) for table in tables),
        sample_tokens=torch.empty(0, dtype=torch.int64),
        sample_slots=np.empty(0, np.int32),
        sample_positions=np.empty(0, np.int64),
    )

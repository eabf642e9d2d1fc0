"""Steps on the CPU without Python between their operations: recorded once, played for any number of tokens and rows."""

import torch
from torch import Tensor

from ...kernels.cpu import tape
from ...kernels.cpu.linear import MOST_DOTS
from ...parallel.group import Group
from .decoder import Decoder
from .kv_cache import KVCache
from .slots import Slots, StepInputs


class RecordedSteps:
    """Runs the decoder. On the CPU steps are alike but for what lies in the memory of their inputs and how much of it, so one is
    recorded: the longest there can be; or, where torch is given products of many tokens, the longest that needs none, and
    longer ones run as they come. So do models in which torch computes something, groups whose collectives are not C calls,
    and hosts without a compiler."""

    def __init__(self, decoder: Decoder, cache: KVCache, group: Group, slots: Slots) -> None:
        """slots: what lays out the inputs of all steps."""
        self._decoder = decoder
        self._cache = cache
        self._step: _Step | None = None
        if group.device.type != "cpu" or not group.playable or not tape.is_available():
            return
        for num_tokens in (slots.max_num_tokens, MOST_DOTS)[: 1 + (slots.max_num_tokens > MOST_DOTS)]:
            try:
                self._step = _Step(decoder, cache, slots.places(num_tokens))
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

    def __init__(self, decoder: Decoder, cache: KVCache, places: StepInputs) -> None:
        """places: of the inputs of all plays. Raises NotPlayableError."""
        self._places = places
        self._tape = tape.Tape(len(places.token_ids), len(places.attention[0].context_lens))
        with torch.inference_mode(), self._tape.recording():
            self._hidden = decoder.forward(places, cache)

    def has_room(self, inputs: StepInputs) -> bool:
        return len(inputs.token_ids) <= self._tape.num_tokens

    def play(self, inputs: StepInputs) -> Tensor:
        assert inputs.token_ids.data_ptr() == self._places.token_ids.data_ptr(), (
            "the inputs of a step, all laid out by the same Slots, lie where they were when it was recorded"
        )
        num_tokens = len(inputs.token_ids)
        self._tape.play(num_tokens, len(inputs.attention[0].context_lens))
        return self._hidden[:num_tokens]

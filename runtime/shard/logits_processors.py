"""Changes logits before a token is chosen: masks, biases and penalties.

In vLLM's order (`vllm/v1/sample/sampler.py`, the docstring of its `Sampler`): allowed_token_ids, bad_words, min_tokens,
logit_bias, penalties; temperature and what follows are the sampler's. Log probabilities are of the raw logits.

A rank changes the logits of its own vocabulary rows and needs no other rank for it. Nothing here waits for the device:
tokens are counted there, before the host knows them.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels.host import to_device
from ..coordinator.logits_rules import LogitsRules
from ..coordinator.plan import Int32, SlotSampling
from .bad_words import BadWords
from .penalties import Penalties
from .slot_entries import SlotEntries, local_columns

Int64 = npt.NDArray[np.int64]
_NO_RULES = LogitsRules()


class LogitsProcessors:
    """All of them, for `max_num_seqs` slots.

    Device memory, made when the first request that needs it opens a slot: for each slot and vocabulary row of this rank
    6 bytes (a count 4, prompt 1, mask 1), and 4 for each token in a slot, up to twice the longest request.
    """

    def __init__(self, vocab_rows: range, max_num_seqs: int, device: torch.device) -> None:
        """vocab_rows: the global token ids of this rank's logits."""
        self._vocab_rows = vocab_rows
        self._device = device
        self._stop_from = np.zeros(max_num_seqs, np.int64)
        self._stop_ids = SlotEntries(1)  # column
        self._bias = SlotEntries(2)  # column, value
        self._mask = _Mask(vocab_rows, max_num_seqs, device)
        self._bad_words = BadWords(vocab_rows, max_num_seqs, device)
        self._penalties = Penalties(vocab_rows, max_num_seqs, device)

    def open(self, slot: int, sampling: SlotSampling) -> bool:
        """Set all that is kept for a slot; what it held before is gone. False if its logits are never to change."""
        rules = sampling.rules or _NO_RULES
        stop_columns = local_columns(sampling.stop_ids, self._vocab_rows)
        self._stop_from[slot] = sampling.stop_from
        self._stop_ids.set(slot, stop_columns[:, None].astype(np.float64))
        bias = np.array(rules.logit_bias, np.float64).reshape(-1, 2) - (self._vocab_rows.start, 0.0)
        is_ours = (bias[:, 0] >= 0) & (bias[:, 0] < len(self._vocab_rows))
        self._bias.set(slot, bias[is_ours])
        self._mask.open(slot, rules)
        self._bad_words.open(slot, rules)
        self._penalties.open(slot, rules)
        return sampling.rules is not None or bool(sampling.stop_ids)

    def apply(self, logits: Tensor, slots: Int32, positions: Int64) -> Tensor:
        """The changed logits, [R, vocabulary rows] float32; the given ones where no row is to change.

        slots      [R], the slot of each row
        positions  [R], the place in the sequence of the token to be chosen, prompt included, from 0
        """
        masked = self._mask.active[slots]
        with_words = self._bad_words.active[slots]
        penalized = self._penalties.active[slots]
        ends = self._early_ends(slots, positions)
        bias_rows, bias = self._bias.of(slots)
        if not (masked.any() or with_words.any() or penalized.any() or len(ends) or len(bias)):
            return logits
        logits = logits.clone()
        if masked.any():
            self._mask.apply(logits, np.flatnonzero(masked), slots[masked])
        if with_words.any():
            self._bad_words.apply(logits, slots)
        if len(ends):
            index = to_device(ends, self._device)
            minus_infinity = torch.full((), -math.inf, device=self._device)
            logits.index_put_((index[:, 0], index[:, 1]), minus_infinity)
        if len(bias):
            entries = to_device(np.column_stack((bias_rows, bias)), self._device)
            logits[entries[:, 0].long(), entries[:, 1].long()] += entries[:, 2].float()
        if penalized.any():
            self._penalties.apply(logits, np.flatnonzero(penalized), slots[penalized])
        return logits

    def add_chosen(self, slots: Int32, token_ids: Tensor) -> None:
        """Count the tokens that were chosen, [R] int64, as output; NO_TOKEN counts as none."""
        penalized = self._penalties.active[slots]
        if penalized.any():
            self._penalties.add_chosen(np.flatnonzero(penalized), slots[penalized], token_ids)
        with_words = self._bad_words.active[slots]
        if with_words.any():
            self._bad_words.add_chosen(np.flatnonzero(with_words), slots[with_words], token_ids)

    def _early_ends(self, slots: Int32, positions: Int64) -> Int64:
        """[N, 2] rows and columns of the end tokens of rows where it is too early for them."""
        rows, columns = self._stop_ids.of(slots)
        is_early = (positions < self._stop_from[slots])[rows]
        return np.column_stack((rows, columns))[is_early].astype(np.int64)


class _Mask:
    """allowed_token_ids, and bad words of one token."""

    def __init__(self, vocab_rows: range, max_num_seqs: int, device: torch.device) -> None:
        self.active = np.zeros(max_num_seqs, np.bool_)  # by slot
        self._vocab_rows = vocab_rows
        self._device = device
        self._banned: Tensor | None = (
            None  # [slots, vocabulary rows] bool; of slots that are not active: anything
        )

    def open(self, slot: int, rules: LogitsRules) -> None:
        bad_ids = tuple(word[0] for word in rules.bad_words if len(word) == 1)
        self.active[slot] = rules.allowed_token_ids is not None or bool(bad_ids)
        if not self.active[slot]:
            return
        if self._banned is None:
            shape = len(self.active), len(self._vocab_rows)
            self._banned = torch.zeros(shape, dtype=torch.bool, device=self._device)
        banned = self._banned[slot]
        banned.fill_(rules.allowed_token_ids is not None)
        for token_ids, value in ((rules.allowed_token_ids or (), False), (bad_ids, True)):
            columns = local_columns(token_ids, self._vocab_rows)
            banned.index_fill_(0, to_device(columns, self._device), value)

    def apply(self, logits: Tensor, rows: Int64, slots: Int32) -> None:
        """Masked tokens of rows[i], which is slots[i], to -inf."""
        assert self._banned is not None, "no slot with a mask was opened"
        index = to_device(np.stack((rows, slots)), self._device)
        logits[index[0]] = logits[index[0]].masked_fill_(self._banned[index[1]], -math.inf)

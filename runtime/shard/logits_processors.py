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
from .slot_entries import SlotEntries

Int64 = npt.NDArray[np.int64]
_NO_RULES = LogitsRules()


class LogitsProcessors:
    """All of them, for `max_num_seqs` slots.

    Device memory, made when the first request that needs it opens a slot, is at most 6 bytes for each slot and
    vocabulary row of this rank: a count (4), a bit for the prompt (1) and one for the mask (1).
    """

    def __init__(self, vocab_rows: range, max_num_seqs: int, device: torch.device) -> None:
        """vocab_rows: the global token ids of this rank's logits."""
        self._vocab_rows = vocab_rows
        self._device = device
        self._active = np.zeros(max_num_seqs, np.bool_)  # by slot: may anything of this be needed?
        self._stop_from = np.zeros(max_num_seqs, np.int64)
        self._stop_ids = SlotEntries(1)  # column
        self._bias = SlotEntries(2)  # column, value
        self._mask = _Mask(vocab_rows, max_num_seqs, device)
        self._bad_words = BadWords(vocab_rows, max_num_seqs, device)
        self._penalties = _Penalties(vocab_rows, max_num_seqs, device)

    def open(self, slot: int, sampling: SlotSampling) -> None:
        """Set all that is kept for a slot; what it held before is gone."""
        self._active[slot] = sampling.rules is not None or bool(sampling.stop_ids)
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

    def apply(self, logits: Tensor, slots: Int32, positions: Int64) -> Tensor:
        """The changed logits, [R, vocabulary rows] float32; the given ones where no row is to change.

        slots      [R], the slot of each row
        positions  [R], the place in the sequence of the token to be chosen, prompt included, from 0
        """
        if not self._active[slots].any():
            return logits
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
        if not self._active[slots].any():
            return
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


class _Penalties:
    """repetition_penalty over prompt and output, frequency_penalty and presence_penalty over output.

    With c(t) the times that token t is in the output:

        logit > 0:  logit / repetition_penalty  if t is in prompt or output
        else:       logit * repetition_penalty  if t is in prompt or output
        then        logit - frequency_penalty * c(t) - presence_penalty * [c(t) > 0]

    as in vLLM (`vllm/model_executor/layers/utils.py`, `apply_penalties`). repetition_penalty is of CTRL (Keskar et al.,
    2019), without its case of logits that are not positive.
    """

    def __init__(self, vocab_rows: range, max_num_seqs: int, device: torch.device) -> None:
        self.active = np.zeros(max_num_seqs, np.bool_)  # by slot
        self._vocab_rows = vocab_rows
        self._device = device
        self._factors = np.zeros((3, max_num_seqs), np.float32)  # repetition, frequency, presence
        # Both [slots, vocabulary rows]; of slots that are not active: anything.
        self._counts: Tensor | None = None  # int32, of the output
        self._in_prompt: Tensor | None = None  # bool

    def open(self, slot: int, rules: LogitsRules) -> None:
        self.active[slot] = rules.penalizes
        if not rules.penalizes:
            return
        self._factors[:, slot] = rules.repetition_penalty, rules.frequency_penalty, rules.presence_penalty
        if self._counts is None or self._in_prompt is None:
            shape = len(self.active), len(self._vocab_rows)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
        columns, counts = np.unique(local_columns(rules.output_ids, self._vocab_rows), return_counts=True)
        index = to_device(np.stack((columns, counts)), self._device)
        self._counts[slot].zero_().index_copy_(0, index[0], index[1].int())
        prompt = local_columns(rules.prompt_ids, self._vocab_rows)
        self._in_prompt[slot].zero_().index_fill_(0, to_device(prompt, self._device), True)

    def apply(self, logits: Tensor, rows: Int64, slots: Int32) -> None:
        """Penalise the logits of rows[i], which is slots[i]."""
        assert self._counts is not None, "no slot with penalties was opened"
        assert self._in_prompt is not None, "made with the counts"
        factors = self._factors[:, slots]
        repetition, frequency, presence = to_device(factors, self._device)[:, :, None]
        index = to_device(np.stack((rows, slots)), self._device)
        penalized, counts = logits[index[0]], self._counts[index[1]]
        in_output = counts > 0
        if (factors[0] != 1.0).any():
            scaled = torch.where(penalized > 0, penalized / repetition, penalized * repetition)
            penalized = torch.where(in_output | self._in_prompt[index[1]], scaled, penalized)
        penalized -= frequency * counts
        penalized -= presence * in_output
        logits[index[0]] = penalized

    def add_chosen(self, rows: Int64, slots: Int32, token_ids: Tensor) -> None:
        """One more of token_ids[rows[i]] in slots[i]."""
        assert self._counts is not None, "no slot with penalties was opened"
        index = to_device(np.stack((rows, slots)), self._device)
        column = token_ids[index[0]] - self._vocab_rows.start
        is_ours = (column >= 0) & (column < len(self._vocab_rows))  # NO_TOKEN is on no rank
        self._counts[index[1], column.clamp(0, len(self._vocab_rows) - 1)] += is_ours


def local_columns(token_ids: tuple[int, ...], vocab_rows: range) -> Int64:
    """The columns of those tokens that are among `vocab_rows`."""
    columns = np.asarray(token_ids, np.int64) - vocab_rows.start
    return columns[(columns >= 0) & (columns < len(vocab_rows))]

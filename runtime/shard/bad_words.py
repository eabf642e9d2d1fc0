"""Bad words of several tokens: the last one is banned after the others have come."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels.host import to_device
from ..coordinator.logits_rules import LogitsRules
from ..coordinator.plan import NO_TOKEN, Int32
from .slot_entries import SlotEntries

Int64 = npt.NDArray[np.int64]
_ANY = -2  # before a word that is shorter than the longest; no token, and not NO_TOKEN


class BadWords:
    """Keeps the last output tokens of each slot on the device, and compares them with the beginnings of its words.

    Only a word's output counts, as in vLLM (`vllm/v1/sample/ops/bad_words.py`): one that begins in the prompt is not
    banned. A rank keeps the words whose last token is among its vocabulary rows.
    """

    def __init__(self, vocab_rows: range, max_num_seqs: int, device: torch.device) -> None:
        self.active = np.zeros(max_num_seqs, np.bool_)  # by slot
        self._vocab_rows = vocab_rows
        self._device = device
        # A word: its beginning, as many numbers as `_recent` is wide, and the column of its last token.
        self._words = SlotEntries(1)
        # [slots, tokens of the longest beginning so far] int64, the newest last, NO_TOKEN before the first.
        self._recent = torch.empty(max_num_seqs, 0, dtype=torch.int64, device=device)

    def open(self, slot: int, rules: LogitsRules) -> None:
        """Set the slot's words and last tokens; what it held before is gone."""
        words = [word for word in rules.bad_words if len(word) > 1 and word[-1] in self._vocab_rows]
        self.active[slot] = bool(words)
        width = max((len(word) - 1 for word in words), default=0)
        if width > self._recent.shape[1]:
            self._recent = torch.nn.functional.pad(
                self._recent, (width - self._recent.shape[1], 0), value=NO_TOKEN
            )
            self._words.pad_left(width + 1, _ANY)
        width = self._recent.shape[1]
        entries = np.full((len(words), width + 1), _ANY, np.float64)
        for entry, word in zip(entries, words, strict=True):
            entry[-len(word) :] = *word[:-1], word[-1] - self._vocab_rows.start
        self._words.set(slot, entries)
        if words:
            recent = np.full(width, NO_TOKEN, np.int64)
            known = np.asarray(rules.output_ids[-width:], np.int64)
            recent[width - len(known) :] = known
            self._recent[slot] = to_device(recent, self._device)

    def apply(self, logits: Tensor, slots: Int32) -> None:
        """The tokens that would complete a word to -inf; row i of `logits` is slots[i]."""
        rows, words = self._words.of(slots)
        entries = to_device(np.column_stack((rows, slots[rows], words)).astype(np.int64), self._device)
        begun, recent = entries[:, 2:-1], self._recent[entries[:, 1]]
        completes = ((begun == recent) | (begun == _ANY)).all(1)
        # Added up, as several words may end with the same token.
        change = torch.where(completes, -math.inf, 0.0)
        logits.index_put_((entries[:, 0], entries[:, -1]), change, accumulate=True)

    def add_chosen(self, rows: Int64, slots: Int32, token_ids: Tensor) -> None:
        """token_ids[rows[i]] is the newest of slots[i]."""
        index = to_device(np.stack((rows, slots)), self._device)
        recent = self._recent[index[1]]
        self._recent[index[1]] = torch.cat((recent[:, 1:], token_ids[index[0]][:, None]), 1)

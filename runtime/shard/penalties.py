"""presence_penalty, frequency_penalty and repetition_penalty, from counts that stay on the device."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels.host import to_device
from ..coordinator.logits_rules import LogitsRules
from ..coordinator.plan import Int32
from .slot_entries import local_columns

Int64 = npt.NDArray[np.int64]


class Penalties:
    """repetition_penalty over prompt and output, frequency_penalty and presence_penalty over output.

    With c(t) the times that token t is in the output:

        logit > 0:  logit / repetition_penalty  if t is in prompt or output
        else:       logit * repetition_penalty  if t is in prompt or output
        then        logit - frequency_penalty * c(t) - presence_penalty * [c(t) > 0]

    as in vLLM (`vllm/model_executor/layers/utils.py`, `apply_penalties`). repetition_penalty is that of CTRL (Keskar et
    al., 2019), which divides; a logit that is not positive is multiplied, as division would raise it.

    Only tokens that a row has seen change, and these are few beside the vocabulary. So each slot has a list of columns
    that holds at least those: an entry too many does no harm, since what becomes of a logit depends on its column's
    count alone, and entries of the same column write the same value.
    """

    def __init__(self, vocab_rows: range, max_num_seqs: int, device: torch.device) -> None:
        self.active = np.zeros(max_num_seqs, np.bool_)  # by slot
        self._vocab_rows = vocab_rows
        self._device = device
        self._factors = np.zeros((3, max_num_seqs), np.float32)  # repetition, frequency, presence
        # Both [slots, vocabulary rows], empty before they are needed; of slots that are not active: anything.
        self._counts = torch.empty(0, dtype=torch.int32, device=device)  # of the output
        self._in_prompt = torch.empty(0, dtype=torch.bool, device=device)
        # [slots, places] int32 columns, as wide as the longest list so far needs; behind a list: any columns.
        self._seen = torch.empty(max_num_seqs, 0, dtype=torch.int32, device=device)
        self._num_seen = np.zeros(max_num_seqs, np.int64)  # entries of each list

    def open(self, slot: int, rules: LogitsRules) -> None:
        """Set what is known of the slot's prompt and output; what it held before is gone."""
        self.active[slot] = rules.penalizes
        if not rules.penalizes:
            return
        self._factors[:, slot] = rules.repetition_penalty, rules.frequency_penalty, rules.presence_penalty
        if not len(self._counts):
            shape = len(self.active), len(self._vocab_rows)
            self._counts = self._counts.new_zeros(shape)
            self._in_prompt = self._in_prompt.new_zeros(shape)
        columns, counts = np.unique(local_columns(rules.output_ids, self._vocab_rows), return_counts=True)
        index = to_device(np.stack((columns, counts)), self._device)
        self._counts[slot].zero_().index_copy_(0, index[0], index[1].int())
        prompt = local_columns(rules.prompt_ids, self._vocab_rows)
        self._in_prompt[slot].zero_().index_fill_(0, to_device(prompt, self._device), True)
        seen = np.union1d(columns, prompt).astype(np.int32)
        self._num_seen[slot] = len(seen)
        self._make_room(len(seen))
        self._seen[slot, : len(seen)] = to_device(seen, self._device)

    def apply(self, logits: Tensor, rows: Int64, slots: Int32) -> None:
        """Penalise the logits of rows[i], which is slots[i]."""
        longest = int(self._num_seen[slots].max())
        factors = self._factors[:, slots]
        repetition, frequency, presence = to_device(factors, self._device)[:, :, None]
        row, slot = to_device(np.stack((rows, slots)), self._device)[:, :, None]
        if longest <= len(self._vocab_rows):
            column = self._seen[slot[:, 0], :longest].long()
        else:
            column = torch.arange(len(self._vocab_rows), device=self._device)[None]
        penalized, counts = logits[row, column], self._counts[slot, column]
        in_output = counts > 0
        if (factors[0] != 1.0).any():
            scaled = torch.where(penalized > 0, penalized / repetition, penalized * repetition)
            penalized = torch.where(in_output | self._in_prompt[slot, column], scaled, penalized)
        penalized -= frequency * counts
        penalized -= presence * in_output
        logits[row, column] = penalized

    def add_chosen(self, rows: Int64, slots: Int32, token_ids: Tensor) -> None:
        """One more of token_ids[rows[i]] in slots[i]; NO_TOKEN counts as none."""
        width = len(self._vocab_rows)
        places = self._num_seen[slots]
        self._num_seen[slots] += 1
        self._make_room(int(places.max()) + 1)
        # Lists as long as the vocabulary are no longer read, and grow no more.
        row, slot, place = to_device(np.stack((rows, slots, places.clip(max=width - 1))), self._device)
        column = token_ids[row] - self._vocab_rows.start
        is_ours = (column >= 0) & (column < width)
        column = column.clamp(0, width - 1)
        self._counts[slot, column] += is_ours
        self._seen[slot, place] = column.int()

    def _make_room(self, num_places: int) -> None:
        width = self._seen.shape[1]
        if num_places > width and width < len(self._vocab_rows):
            wanted = min(max(num_places, 2 * width), len(self._vocab_rows))
            self._seen = torch.nn.functional.pad(self._seen, (0, wanted - width))

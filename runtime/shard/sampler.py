"""Chooses tokens from logits that stay sharded over the vocabulary.

Every rank comes to the same token, bit for bit, and a row's token depends on its logits, its settings and its
position alone: not on the number of ranks, nor on the other rows of the batch.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels import sampling_ops as ops
from ...kernels.host import to_device
from ...parallel.group import Group
from ..coordinator.plan import Int32, SlotSampling
from .logits_processors import LogitsProcessors
from .logprobs import Logprobs, LogprobTensors
from .radix_select import cut_at_weight

_MAX_VOCAB_SIZE = 1 << 22  # so that the mass of all tokens fits into an int64
_PROCESSING, _NOISE, _LOGPROBS = 1, 2, 4  # what a slot may need besides the largest logit

Int64 = npt.NDArray[np.int64]


class Sampler:
    """Greedy choice, or a sample after temperature, min_p, top_k and top_p, with vLLM's meaning and order.

    For each row: change the logits (`LogitsProcessors`), divide by the temperature, keep logits at or above the cut, add
    Gumbel noise, take the largest (Gumbel-max). The cut is the highest of three:
      min_p  log(min_p) below the row's largest logit
      top_k  the k-th largest logit
      top_p  the largest value such that what is at or above it holds top_p of the mass that min_p and top_k left
    Tokens that equal the cut are all kept, even if these are then more than k. Equal sums go to the lower token id.

    A row whose best logit is NaN or infinite (the NaN of any rank counts) gets NO_TOKEN, on every rank: what it
    would have sampled means nothing. Its logprob is not finite.
    """

    def __init__(
        self, group: Group, vocab_rows: range, vocab_size: int, max_num_seqs: int, device: torch.device
    ) -> None:
        """vocab_rows: the global token ids of this rank's logits, at least one; together the ranks hold all."""
        assert len(vocab_rows), "a rank needs at least one vocabulary row"
        assert vocab_rows.step == 1, f"a rank needs adjacent vocabulary rows, not {vocab_rows}"
        assert vocab_size < _MAX_VOCAB_SIZE, f"vocabulary of {vocab_size} is not below {_MAX_VOCAB_SIZE}"
        self.group = group
        self.vocab_rows = vocab_rows
        self.vocab_size = vocab_size
        self.device = device
        # One entry a slot, on the host: from these all ranks choose the same stages.
        self._temperature = np.ones(max_num_seqs, np.float64)
        self._top_k = np.full(max_num_seqs, vocab_size, np.int64)
        self._top_p = np.ones(max_num_seqs, np.float64)
        self._log_min_p = np.full(max_num_seqs, -np.inf, np.float64)
        self._needs = np.zeros(max_num_seqs, np.uint8)
        self._seed = np.zeros(max_num_seqs, np.uint64)
        self._sample_index = np.zeros(max_num_seqs, np.int64)
        self._num_top = np.full(max_num_seqs, -1, np.int64)  # of the log probabilities wanted; -1: none are
        self.logprobs = Logprobs(group, vocab_rows, vocab_size)
        self._processors = LogitsProcessors(vocab_rows, max_num_seqs, device)

    def open(self, slot: int, sampling: SlotSampling) -> None:
        """Set all that is kept for a slot; what it held before is gone."""
        samples = not sampling.greedy
        limits_k = samples and sampling.top_k > 0
        self._temperature[slot] = sampling.temperature if samples else 1.0
        self._top_k[slot] = min(sampling.top_k, self.vocab_size) if limits_k else self.vocab_size
        self._top_p[slot] = sampling.top_p if samples else 1.0
        self._log_min_p[slot] = math.log(sampling.min_p) if samples and sampling.min_p > 0 else -math.inf
        self._seed[slot] = sampling.seed
        self._sample_index[slot] = sampling.sample_index
        self._num_top[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self._needs[slot] = (
            _PROCESSING * self._processors.open(slot, sampling)
            | _NOISE * samples
            | _LOGPROBS * (sampling.logprobs is not None)
        )

    def sample(self, logits: Tensor, slots: Int32, positions: Int64) -> tuple[Tensor, LogprobTensors | None]:
        """One token per row, counted as output of its slot; all ranks call it with the same slots and positions.

        logits     [R, len(vocab_rows)] float32; not changed
        slots      [R], the slot of each row
        positions  [R], the place in the sequence of the token to be sampled, prompt included, from 0
        returns    token ids [R] int64 (NO_TOKEN for a row that is broken), and log probabilities under the raw
                   logits, of these tokens and of as many others as the row wants that asks for most, or None if no
                   row of the batch asks for any
        """
        shape = (len(slots), len(self.vocab_rows))
        assert logits.shape == shape, f"logits of shape {tuple(logits.shape)}, expected {shape}"
        assert logits.dtype == torch.float32, f"logits of {logits.dtype}, expected float32"
        needs = np.bitwise_or.reduce(self._needs[slots])
        processed = self._processors.apply(logits, slots, positions) if needs & _PROCESSING else logits
        if needs & _NOISE:
            packed = self._perturbed_best(processed, slots, positions)
        else:
            packed = ops.row_argmax(processed, first_token=self.vocab_rows.start)
        # That of a broken row is -1, NO_TOKEN.
        _, token_ids = ops.best_of_ranks(self.group.all_gather(packed, "sampler.argmax"))
        if needs & _PROCESSING:
            self._processors.add_chosen(slots, token_ids)
        if not needs & _LOGPROBS:
            return token_ids, None
        return token_ids, self.logprobs.of(logits, token_ids, int(self._num_top[slots].max()))

    def _perturbed_best(self, logits: Tensor, slots: Int32, positions: Int64) -> Tensor:
        """This rank's largest score and its token, packed: with noise, and in greedy rows of the logits."""
        samples = self._needs[slots] & _NOISE
        places = positions + (self._sample_index[slots] << 32)
        seeds, places, top_k = self._to_device(
            np.stack((self._seed[slots].view(np.int64), places, self._top_k[slots]))
        )
        temperature, top_p, log_min_p, is_sampled = self._to_device(
            np.stack((self._temperature[slots], self._top_p[slots], self._log_min_p[slots], samples))
        )
        temperature = temperature.float()
        cut = self._cut(logits, slots, temperature, log_min_p.float(), top_k, top_p)
        return ops.gumbel_argmax(
            logits, temperature, cut, seeds, places, is_sampled.bool(), first_token=self.vocab_rows.start
        )

    def _cut(
        self,
        logits: Tensor,
        slots: Int32,
        temperature: Tensor,
        log_min_p: Tensor,
        top_k: Tensor,
        top_p: Tensor,
    ) -> Tensor:
        """[R] float32: of logits / temperature, those below it are not sampled. Stages that no row needs are left out.

        Cuts are found among the logits: the k-th largest quotient is the quotient of the k-th largest logit, and
        likewise for top_p, as division by the temperature keeps the order (or makes ties, which are all kept).
        """
        limits_k = self._top_k[slots] < self.vocab_size
        limits_p = self._top_p[slots] < 1.0
        limits_min_p = self._log_min_p[slots] > -math.inf
        cut = torch.full_like(temperature, -math.inf)
        if limits_min_p.any() or limits_p.any():
            max_logits = self.logprobs.row_max(logits) / temperature
        if limits_min_p.any():
            cut = max_logits + log_min_p
        if limits_k.any():
            top_k_cut = cut_at_weight(
                self.group,
                lambda prefix, shift: ops.count_histogram(logits, prefix, shift),
                top_k < self.vocab_size,
                lambda total: top_k,
                "sampler.top_k",
            )
            cut = torch.maximum(cut, top_k_cut / temperature)
        if limits_p.any():
            kept = cut  # what min_p and top_k leave is what top_p is a share of
            top_p_cut = cut_at_weight(
                self.group,
                lambda prefix, shift: ops.mass_histogram(
                    logits, temperature, kept, max_logits, prefix, shift
                ),
                top_p < 1.0,
                lambda total: torch.minimum((total * top_p).ceil().long(), total),
                "sampler.top_p",
            )
            cut = torch.maximum(cut, top_p_cut / temperature)
        return cut

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        return to_device(array, self.device)

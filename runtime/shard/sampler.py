"""Chooses tokens from logits that stay sharded over the vocabulary.

Every rank comes to the same token, bit for bit, and a row's token depends on its logits, its settings and its
position alone: not on the number of ranks, nor on the other rows of the batch.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels.host import to_device
from ...kernels.philox import gumbel_noise
from ...parallel.group import Group
from ..coordinator.plan import NO_TOKEN, Int32, SlotSampling
from .radix_select import MASS_BITS, cut_at_weight, fixed_point_mass, ordered_keys

_MAX_VOCAB_SIZE = 1 << 22  # so that the mass of all tokens fits into an int64
_ID_MASK = 0xFFFFFFFF
_NO_ID = -1
_KEY_OF_INFINITY = 0x7F800000

Int64 = npt.NDArray[np.int64]


class Sampler:
    """Greedy choice, or a sample after temperature, min_p, top_k and top_p, with vLLM's meaning and order.

    For each row: suppress end tokens (min_tokens), divide by the temperature, keep logits at or above the cut, add
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
        self._samples = np.zeros(max_num_seqs, np.bool_)
        self._seed = np.zeros(max_num_seqs, np.uint64)
        self._logprobs = np.zeros(max_num_seqs, np.bool_)
        self._stop_from = np.zeros(max_num_seqs, np.int64)
        # End tokens among this rank's rows, as columns of its logits; as wide as the longest list so far.
        self._stop_columns = np.full((max_num_seqs, 1), _NO_ID, np.int64)

    def open(self, slot: int, sampling: SlotSampling) -> None:
        """Set all that is kept for a slot; what it held before is gone."""
        samples = not sampling.greedy
        limits_k = samples and sampling.top_k > 0
        self._samples[slot] = samples
        self._temperature[slot] = sampling.temperature if samples else 1.0
        self._top_k[slot] = min(sampling.top_k, self.vocab_size) if limits_k else self.vocab_size
        self._top_p[slot] = sampling.top_p if samples else 1.0
        self._log_min_p[slot] = math.log(sampling.min_p) if samples and sampling.min_p > 0 else -math.inf
        self._seed[slot] = sampling.seed
        self._logprobs[slot] = sampling.logprobs
        self._stop_from[slot] = sampling.stop_from
        columns = [token - self.vocab_rows.start for token in sampling.stop_ids if token in self.vocab_rows]
        missing = len(columns) - self._stop_columns.shape[1]
        if missing > 0:
            self._stop_columns = np.pad(self._stop_columns, ((0, 0), (0, missing)), constant_values=_NO_ID)
        self._stop_columns[slot] = _NO_ID
        self._stop_columns[slot, : len(columns)] = columns

    def sample(self, logits: Tensor, slots: Int32, positions: Int64) -> tuple[Tensor, Tensor | None]:
        """One token per row; all ranks call it with the same slots and positions.

        logits     [R, len(vocab_rows)] float32; not changed
        slots      [R], the slot of each row
        positions  [R], the place in the sequence of the token to be sampled, prompt included, from 0
        returns    token ids [R] int64 (NO_TOKEN for a row that is broken), and log probabilities [R] float32 of
                   these tokens under the raw logits, or None if no row of the batch asked for them
        """
        shape = (len(slots), len(self.vocab_rows))
        assert logits.shape == shape, f"logits of shape {tuple(logits.shape)}, expected {shape}"
        assert logits.dtype == torch.float32, f"logits of {logits.dtype}, expected float32"
        scores = self._suppress(logits, slots, positions)
        if self._samples[slots].any():
            scores = self._perturb(scores, slots, positions)
        token_ids = self._argmax(scores)
        if not self._logprobs[slots].any():
            return token_ids, None
        return token_ids, self._chosen_logprobs(logits, token_ids)

    def _suppress(self, logits: Tensor, slots: Int32, positions: Int64) -> Tensor:
        """The logits, with end tokens at -inf where it is too early for them."""
        columns = self._stop_columns[slots]
        early = positions < self._stop_from[slots]
        rows, places = np.nonzero(early[:, None] & (columns != _NO_ID))
        if not len(rows):
            return logits
        index = self._to_device(np.stack((rows, columns[rows, places])))
        return logits.index_put((index[0], index[1]), torch.full((), -math.inf, device=self.device))

    def _perturb(self, logits: Tensor, slots: Int32, positions: Int64) -> Tensor:
        """What the largest element of is the sample; in greedy rows, the logits."""
        samples = self._samples[slots]
        seeds, places, top_k = self._to_device(
            np.stack((self._seed[slots].view(np.int64), positions, self._top_k[slots]))
        )
        noise = gumbel_noise(seeds, places, self.vocab_rows)
        temperature, top_p, log_min_p, is_sampled = self._to_device(
            np.stack((self._temperature[slots], self._top_p[slots], self._log_min_p[slots], samples))
        )
        logits = logits / temperature.float()[:, None]
        if not samples.all():
            noise.mul_(is_sampled.float()[:, None])
        scores = noise.add_(logits)
        cut = self._cut(logits, slots, log_min_p.float(), top_k, top_p)
        # NaN is not below anything, so it stays and marks the row as broken.
        return scores if cut is None else scores.masked_fill_(logits < cut[:, None], -math.inf)

    def _cut(
        self, logits: Tensor, slots: Int32, log_min_p: Tensor, top_k: Tensor, top_p: Tensor
    ) -> Tensor | None:
        """[R] float32: logits below it are not sampled. None if no row of the batch limits anything."""
        limits_k = self._top_k[slots] < self.vocab_size
        limits_p = self._top_p[slots] < 1.0
        limits_min_p = self._log_min_p[slots] > -math.inf
        if not (limits_k | limits_p | limits_min_p).any():
            return None
        cut = torch.full_like(log_min_p, -math.inf)
        pool = logits  # in rows with top_p: all that is above the cut
        if limits_min_p.any() or limits_p.any():
            max_logits = self._row_max(logits)
        if limits_min_p.any():
            cut = max_logits + log_min_p
        if limits_k.any():
            max_k = int(self._top_k[slots][limits_k].max())
            best = logits.topk(min(max_k, len(self.vocab_rows)), sorted=False).values
            if (limits_k | ~limits_p).all():
                pool = best
            ones = torch.ones_like(best, dtype=torch.int32)
            top_k_cut = cut_at_weight(self.group, best, ones, top_k.clamp(max=max_k), "sampler.top_k")
            cut = torch.maximum(cut, torch.where(top_k < self.vocab_size, top_k_cut, -math.inf))
        if limits_p.any():
            cut = torch.maximum(cut, self._top_p_cut(logits, pool, cut, max_logits, top_p))
        return cut

    def _top_p_cut(
        self, logits: Tensor, pool: Tensor, cut: Tensor, max_logits: Tensor, top_p: Tensor
    ) -> Tensor:
        """[R] the cut that leaves top_p of the mass at or above `cut`; -inf in rows with top_p = 1.

        pool [R, P] has all logits above `cut`, but maybe only some of those equal to it. The others count for the
        mass, and that is enough: if they are needed to reach top_p, then `cut` itself is the answer.
        """
        kept = pool.masked_fill(pool < cut[:, None], -math.inf)
        mass = fixed_point_mass(kept, max_logits)
        totals = mass.sum(1).expand(2, -1).clone()  # of the pool, of all that is kept
        if pool is not logits:
            num_ties = (logits == cut[:, None]).sum(1) - (pool == cut[:, None]).sum(1)
            totals[1] += num_ties * fixed_point_mass(cut[:, None], max_logits)[:, 0]
        in_pool, in_all = self.group.all_reduce(totals, "sampler.mass")
        target = torch.minimum((in_all * top_p).ceil().long(), in_pool)
        top_p_cut = cut_at_weight(self.group, kept, mass, target, "sampler.top_p")
        return torch.where(top_p < 1.0, top_p_cut, -math.inf)

    def _row_max(self, logits: Tensor) -> Tensor:
        """[R] the largest logit over all ranks; NaN if there is one."""
        return self.group.all_gather(logits.amax(1), "sampler.max").amax(0)

    def _argmax(self, scores: Tensor) -> Tensor:
        """[R] int64 the global ids of the largest scores over all ranks, or NO_TOKEN."""
        best, column = scores.max(1)  # the first one of equals
        # Above: the score's key, where NaN counts as infinity and -0.0 as 0.0. Below: the id, the lowest one largest.
        keys = ordered_keys(torch.nan_to_num(best, nan=math.inf, posinf=math.inf, neginf=-math.inf) + 0.0)
        packed = (keys.long() << 32) | (_ID_MASK - (column + self.vocab_rows.start))
        winner = self.group.all_gather(packed, "sampler.argmax").amax(0)
        key = winner >> 32
        finite = (key < _KEY_OF_INFINITY) & (key > ~_KEY_OF_INFINITY)
        return torch.where(finite, _ID_MASK - (winner & _ID_MASK), NO_TOKEN)

    def _chosen_logprobs(self, logits: Tensor, token_ids: Tensor) -> Tensor:
        """[R] float32 log softmax of the logits at the tokens."""
        max_logits = self._row_max(logits)
        mass = fixed_point_mass(logits, max_logits).sum(1)
        column = token_ids - self.vocab_rows.start
        is_ours = (column >= 0) & (column < len(self.vocab_rows))
        ours = logits.gather(1, column.clamp(0, len(self.vocab_rows) - 1)[:, None])[:, 0]
        bits = torch.where(is_ours, ours.view(torch.int32), 0).long()  # one rank has the token, others add 0
        mass, bits = self.group.all_reduce(torch.stack((mass, bits)), "sampler.logprobs")
        chosen = bits.int().view(torch.float32)
        log_total = (mass.double() * 2.0**-MASS_BITS).log()
        logprobs: Tensor = chosen.double() - max_logits.double() - log_total
        return logprobs.float()

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        return to_device(array, self.device)

"""Log probabilities of given tokens, and which are the most likely, from logits that stay sharded over the vocabulary."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import sampling_ops as ops
from ...parallel.group import Group
from .radix_select import ordered_keys, values_of_keys

ID_MASK = 0xFFFFFFFF


class LogprobTensors(NamedTuple):
    """What LogprobTable holds, still on the device."""

    token_ids: Tensor  # [R, 1 + N] int64
    logprobs: Tensor  # [R, 1 + N] float32
    ranks: Tensor  # [R, 1 + N] int64


class Logprobs:
    """The same numbers, bit for bit, on every rank and for any number of ranks. Nothing here waits for the device.

    Work space beside the logits: at most 16 bytes for each of them.
    """

    def __init__(self, group: Group, vocab_rows: range, vocab_size: int) -> None:
        """vocab_rows: the global token ids of this rank's logits."""
        self._group = group
        self._vocab_rows = vocab_rows
        self._vocab_size = vocab_size

    def row_max(self, logits: Tensor) -> Tensor:
        """[R] the largest logit over all ranks; NaN if there is one."""
        packed = ops.row_argmax(logits, first_token=self._vocab_rows.start)
        return ops.best_of_ranks(self._group.all_gather(packed, "sampler.max"))[0]

    def of(self, logits: Tensor, token_ids: Tensor, num_top: int) -> LogprobTensors:
        """Log softmax of the logits at `token_ids`, and at the `num_top` largest logits, in this order.

        logits     [R, len(vocab_rows)] float32; not changed
        token_ids  [R] int64, global; one that no rank has gets numbers that mean nothing
        returns    N = num_top, or the size of the vocabulary if that is less. Of equal logits the lower id comes first.
                   A rank is 1 + the number of greater logits, so equal ones share it. A row whose best logit is not
                   finite has no finite log probability.
        """
        rows = self._vocab_rows
        max_logits = self.row_max(logits)
        mass = ops.row_mass(logits, max_logits)
        column = token_ids - rows.start
        is_ours = (column >= 0) & (column < len(rows))
        ours = logits.gather(1, column.clamp(0, len(rows) - 1)[:, None])[:, 0]
        bits = torch.where(is_ours, ours.view(torch.int32), 0).long()  # one rank has the token, others add 0
        mass, bits = self._group.all_reduce(torch.stack((mass, bits)), "logprobs.chosen")
        values = bits.int().view(torch.float32)[:, None]
        # As bytes: on the CPU torch sums those eight times faster than booleans.
        num_greater = (logits > values).view(torch.int8).sum(1, dtype=torch.int32).long()
        ranks = self._group.all_reduce(num_greater, "logprobs.rank")[:, None] + 1
        token_ids = token_ids[:, None]
        if num_top > 0:
            top_values, top_ids = self._top(logits, min(num_top, self._vocab_size))
            # What is greater than one of the largest is one of them.
            top_ranks = (top_values[:, None, :] > top_values[:, :, None]).sum(2) + 1
            values = torch.cat((values, top_values), 1)
            ranks = torch.cat((ranks, top_ranks), 1)
            token_ids = torch.cat((token_ids, top_ids), 1)
        log_total = (mass.double() * 2.0**-ops.MASS_BITS).log()
        logprobs = values.double() - max_logits.double()[:, None] - log_total[:, None]
        return LogprobTensors(token_ids, logprobs.float(), ranks)

    def _top(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """[R, count] the largest logits over all ranks and their token ids."""
        rows = self._vocab_rows
        # Above: the logit's key, the same for either zero. Below: the id, the lowest one largest.
        packed = ordered_keys(logits + 0.0).long()
        packed <<= 32
        packed |= ID_MASK - torch.arange(rows.start, rows.stop, device=logits.device)
        best = packed.topk(min(count, len(rows)), 1).values
        # A rank with fewer rows fills up with what comes after everything, as all ranks gather the same shape.
        best = F.pad(best, (0, count - best.shape[1]), value=torch.iinfo(torch.int64).min)
        best = self._group.all_gather(best.contiguous(), "logprobs.top").transpose(0, 1).flatten(1)
        best = best.topk(count, 1).values
        return values_of_keys((best >> 32).int()), ID_MASK - (best & ID_MASK)

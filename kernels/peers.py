"""Memory that every rank of a model can read and write directly: what the one-shot all-reduce works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PeerBuffers:
    """One rank's view of the buffers of all ranks. Made once; the kernel changes what is in them.

    data         [2, max_rows, max_hidden] contiguous: this rank's rows, in two slots, read by every rank
    signals      [max_rows, world_size] int64, contiguous: the number of the last sum for which rank p has put its row
                 here; written by rank p, read by this rank only
    sequence     [max_rows] int64: the number of the last sum of each row, 0 before the first; this rank's alone.
                 It lives on the device so that a captured graph counts on at every replay.
    data_table, signal_table   [world_size] int64: addresses of every rank's data and signals as seen from here
    num_programs   rows in work at once. Their programs wait for those of other ranks, so all of them must fit on the
                   device together: at most its number of multiprocessors, less where several ranks share it.
    mapped       the tensors behind the tables; the addresses are valid as long as they live
    """

    rank: int
    data: Tensor
    signals: Tensor
    sequence: Tensor
    data_table: Tensor
    signal_table: Tensor
    num_programs: int
    mapped: tuple[Tensor, ...]

    @classmethod
    def build(
        cls, rank: int, data: Sequence[Tensor], signals: Sequence[Tensor], num_programs: int
    ) -> PeerBuffers:
        """From the data and signals of all ranks, by rank, mapped here; all signals 0."""
        device = data[rank].device

        def table(tensors: Sequence[Tensor]) -> Tensor:
            return torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64, device=device)

        _, max_rows, max_hidden = data[rank].shape
        for x, words in zip(data, signals, strict=True):
            assert x.shape == (2, max_rows, max_hidden), f"data of shape {list(x.shape)}"
            assert words.shape == (max_rows, len(data)), f"signals of shape {list(words.shape)}"
            assert (x.dtype, words.dtype) == (data[rank].dtype, torch.int64), f"{x.dtype}, {words.dtype}"
            assert all(y.is_contiguous() for y in (x, words)), "peers count on the layout"
        return cls(
            rank=rank,
            data=data[rank],
            signals=signals[rank],
            sequence=torch.zeros(data[rank].shape[1], dtype=torch.int64, device=device),
            data_table=table(data),
            signal_table=table(signals),
            num_programs=num_programs,
            mapped=(*data, *signals),
        )

    @property
    def world_size(self) -> int:
        return self.data_table.shape[0]

    @property
    def max_rows(self) -> int:
        return self.data.shape[1]

    @property
    def max_hidden(self) -> int:
        return self.data.shape[2]

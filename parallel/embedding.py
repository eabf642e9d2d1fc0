"""The two layers that are split over the vocabulary: token embedding and LM head."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.linear_ops import LinearWeight, embedding, linear
from .group import Group


class VocabParallelEmbedding:
    """Rows of the embedding table by token id; each rank has the ids in `vocab_rows`.

    A rank puts zeros where another rank owns the id, so the sum over ranks is the lookup, exactly: x + 0 = x. Every
    number is multiplied by `scale`.

    | tensor    | shape                  | placement                                  |
    |-----------|------------------------|--------------------------------------------|
    | token_ids | [R], int64 or int32    | the same on all ranks, 0 <= id < vocab     |
    | weight    | [vocab_local, hidden]  | split over rows; vocab_local may be 0      |
    | y         | [R, hidden]            | the same on all ranks, dtype of the weight |
    """

    def __init__(self, weight: LinearWeight, vocab_rows: range, group: Group, scale: float = 1.0) -> None:
        assert len(weight.shape) == 2, f"weight must be [vocab_local, hidden], got {tuple(weight.shape)}"
        assert vocab_rows.step == 1, "vocab_rows must be contiguous"
        assert len(vocab_rows) == weight.shape[0], f"{len(vocab_rows)} rows, weight {tuple(weight.shape)}"
        self.weight = weight
        self.vocab_rows = vocab_rows
        self.group = group
        self.scale = scale

    def __call__(self, token_ids: Tensor) -> Tensor:
        first_row = None if self.group.world_size == 1 else self.vocab_rows.start
        local = embedding(token_ids, self.weight, first_row, self.scale)
        return self.group.all_reduce(local, "embedding")


class LMHead:
    """Logits of this rank's slice of the vocabulary. No communication: they stay split for the sampler.

    | tensor       | shape                  | placement                                       |
    |--------------|------------------------|-------------------------------------------------|
    | x            | [R, hidden]            | the same on all ranks                           |
    | weight       | [vocab_local, hidden]  | split over rows (the embedding's, when tied)    |
    | logits_local | [R, vocab_local]       | split over columns, always float32              |
    """

    def __init__(self, weight: LinearWeight) -> None:
        assert len(weight.shape) == 2, f"weight must be [vocab_local, hidden], got {tuple(weight.shape)}"
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, dtype=torch.float32)

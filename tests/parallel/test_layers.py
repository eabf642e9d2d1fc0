"""Sharded layers give what the whole layer gives, for uneven and empty shares too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_within
from torch import Tensor
from torch.distributed import Store

from kvshard.kernels.linear_ops import LinearWeight
from kvshard.parallel.embedding import LMHead, VocabParallelEmbedding
from kvshard.parallel.group import Group
from kvshard.parallel.linear import ColumnParallelLinear, RowParallelLinear
from kvshard.parallel.norm import SplitWidth, SplitWidthRMSNorm

from .ranks import connect, run_ranks

HIDDEN, WIDE, VOCAB, ROWS = 24, 40, 101, 5
# Where each rank's share of WIDE columns and of VOCAB rows begins and ends.
SPLITS = {
    1: ([0, 40], [0, 101]),
    2: ([0, 27, 40], [0, 50, 101]),
    3: ([0, 27, 27, 40], [0, 1, 1, 101]),
}


def whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": draw(ROWS, HIDDEN),
        "up": draw(WIDE, HIDDEN),
        "up_bias": draw(WIDE),
        "down": draw(HIDDEN, WIDE),
        "down_bias": draw(HIDDEN),
        "table": draw(VOCAB, HIDDEN),
        "token_ids": torch.tensor([0, 1, 50, 100, 49, 1]),
    }


def check_layers(group: Group) -> list[Tensor]:
    """Asserts what is the same on all ranks; returns this rank's logits."""
    w = whole()
    columns_at, rows_at = SPLITS[group.world_size]
    columns = slice(columns_at[group.rank], columns_at[group.rank + 1])
    rows = range(rows_at[group.rank], rows_at[group.rank + 1])

    up = ColumnParallelLinear(LinearWeight(w["up"][columns]), w["up_bias"][columns])
    down = RowParallelLinear(LinearWeight(w["down"][:, columns]), group, "layer 0 down_proj", w["down_bias"])
    middle = up(w["x"])
    assert middle.shape == (ROWS, columns.stop - columns.start)
    torch.testing.assert_close(
        middle, F.linear(w["x"], w["up"], w["up_bias"])[:, columns], rtol=1e-12, atol=1e-12
    )
    y = down(middle)
    expected = F.linear(F.linear(w["x"], w["up"], w["up_bias"]), w["down"], w["down_bias"])
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)

    # One tensor split over the ranks, and one that all have and one counts.
    split, copied = middle.float(), w["x"].float()
    everywhere = SplitWidth(w["down_bias"].float(), HIDDEN, slice(0, None if group.rank == 0 else 0))
    shares = (SplitWidth(w["up_bias"][columns].float(), WIDE, slice(None)), everywhere)
    SplitWidthRMSNorm(shares, 1e-3, group, "layer 0 qk_norm")(split, copied)
    for got, x, weight, part in (
        (split, F.linear(w["x"], w["up"], w["up_bias"]), w["up_bias"], columns),
        (copied, w["x"], w["down_bias"], slice(None)),
    ):
        whole_norm = F.rms_norm(x, x.shape[1:], weight, 1e-3)
        assert_within(got, whole_norm[:, part].float(), "norm")

    embedding = VocabParallelEmbedding(LinearWeight(w["table"][rows.start : rows.stop]), rows, group)
    for token_ids in (w["token_ids"], w["token_ids"].int()):
        kept = token_ids.clone()
        assert torch.equal(embedding(token_ids), w["table"][token_ids.long()])
        assert torch.equal(token_ids, kept)
    half = VocabParallelEmbedding(LinearWeight(w["table"][rows.start : rows.stop].bfloat16()), rows, group)
    assert torch.equal(half(w["token_ids"]), w["table"].bfloat16()[w["token_ids"]])

    logits_local = LMHead(LinearWeight(w["table"][rows.start : rows.stop].bfloat16()))(w["x"].bfloat16())
    assert logits_local.dtype == torch.float32
    assert logits_local.shape == (ROWS, len(rows))
    return [LMHead(LinearWeight(w["table"][rows.start : rows.stop]))(w["x"])]


def on_rank(store: Store, rank: int, world_size: int) -> list[list[float]]:
    group = connect(store, rank, world_size)
    (logits,) = check_layers(group)
    group.barrier("end")
    return logits.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sharded_layers_equal_the_whole(world_size: int) -> None:
    if world_size == 1:
        parts = [check_layers(Group.single("cpu"))[0]]
    else:
        parts = [torch.tensor(part).reshape(ROWS, -1) for part in run_ranks(on_rank, world_size)]
    w = whole()
    torch.testing.assert_close(
        torch.cat(parts, 1), F.linear(w["x"], w["table"]).float(), rtol=1e-6, atol=1e-6
    )


def test_shares_must_fit_the_weight() -> None:
    with pytest.raises(AssertionError, match="10 rows"):
        VocabParallelEmbedding(LinearWeight(torch.ones(9, 4)), range(10), Group.single("cpu"))

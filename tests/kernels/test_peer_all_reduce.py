"""The fused one-shot all-reduce in real processes, one a rank, over shared memory, against its definition.

The ranks interpret the shipped kernel, protocol included: they copy, post, wait and read at the same time.
"""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from tolerances import assert_within
from torch import Tensor

from kvshard.kernels import reference
from kvshard.kernels.peers import PeerBuffers

from .peer_ranks import EPS, MAX_HIDDEN, MAX_ROWS, RIGHT, SCENARIOS, inputs, sum_all_rounds

pytest.importorskip("triton")

Outcome = list[tuple[Tensor, Tensor]]  # y and residual of each round


@pytest.fixture(scope="module", params=[2, 3, 4])
def by_rank(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Outcome]]:
    """The outcomes of each scenario, by rank."""
    folder, world_size = tmp_path_factory.mktemp("peers"), request.param
    for scenario, dtype in SCENARIOS.items():
        (folder / scenario).mkdir()
        for owner in range(world_size):
            data = bytes(2 * MAX_ROWS * MAX_HIDDEN * dtype.itemsize)
            (folder / scenario / f"data-{owner}").write_bytes(data)
            (folder / scenario / f"signals-{owner}").write_bytes(bytes(MAX_ROWS * world_size * 8))
    return [
        {
            scenario: [tuple(torch.from_numpy(x).to(SCENARIOS[scenario]) for x in pair) for pair in rounds]
            for scenario, rounds in outcomes.items()
        }
        for outcomes in run_ranks(sum_all_rounds, world_size, folder, timeout_s=60)
    ]


def check_definition(outcome: Outcome, world_size: int) -> None:
    for number, (y, residual) in enumerate(outcome):
        xs, expected, weight = inputs(number, y.dtype, world_size)
        reference.all_reduce_add_rms_norm(xs, expected, weight, EPS)
        assert_within(residual, expected, "residual")
        assert_within(y, reference.rms_norm(residual, weight, EPS), "norm")


@pytest.mark.parametrize("scenario", RIGHT)
def test_every_rank_has_the_sum_and_the_same_bits(by_rank: list[dict[str, Outcome]], scenario: str) -> None:
    for outcomes in by_rank:
        check_definition(outcomes[scenario], len(by_rank))
        for mine, first in zip(outcomes[scenario], by_rank[0][scenario], strict=True):
            assert torch.equal(mine[0], first[0])
            assert torch.equal(mine[1], first[1])


@pytest.mark.parametrize("scenario", sorted(SCENARIOS.keys() - set(RIGHT)))
def test_what_is_wrong_is_seen(by_rank: list[dict[str, Outcome]], scenario: str) -> None:
    """Rank 0 reads the wrong row, and the other ranks are right wherever it harms only itself."""
    with pytest.raises(AssertionError, match="not close"):
        check_definition(by_rank[0][scenario], len(by_rank))
    if scenario != "one rank's row is wrong":
        check_definition(by_rank[1][scenario], len(by_rank))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((3, 8), torch.float32, "3 rows do not fit in buffers of 2"),
        ((2, 9), torch.float32, "rows of 9 do not fit in buffers of 8"),
        ((2, 8), torch.float16, "rows of torch.float16 do not fit in buffers of torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, int], dtype: torch.dtype, message: str) -> None:
    from kvshard.kernels.triton.peer_all_reduce import all_reduce_add_rms_norm

    peers = PeerBuffers.build(0, [torch.zeros(2, 2, 8)], [torch.zeros(2, 1, dtype=torch.int64)], 1)
    x = torch.zeros(shape, dtype=dtype)
    with pytest.raises(AssertionError, match=message):
        all_reduce_add_rms_norm(x, x.clone(), x[0], EPS, peers)

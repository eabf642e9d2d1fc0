"""What each rank of test_peer_all_reduce.py runs. Not to be mixed with what imports triton: it is interpreted here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import Store

from kvshard.kernels.peers import PeerBuffers

MAX_ROWS, MAX_HIDDEN = 5, 100
ROUNDS = [
    (5, 37),
    (1, 100),
    (3, 37),
    (5, 1),
    (2, 64),
    (4, 99),
]  # rows and hidden size of one sum after another
EPS = 1e-5
RIGHT = ("f32", "bf16")
SCENARIOS: dict[str, torch.dtype] = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "one rank's row is wrong": torch.float32,
    "a table names one rank twice": torch.float32,
    "a stale slot is read": torch.float32,
}


def inputs(number: int, dtype: torch.dtype, world_size: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Every rank's x, the residual and the weight of a round."""
    rows, hidden = ROUNDS[number]
    generator = torch.Generator().manual_seed(number)
    xs = [torch.randn(rows, hidden, generator=generator).to(dtype) for _ in range(world_size)]
    residual = torch.randn(rows, hidden, generator=generator).to(dtype)
    return xs, residual, torch.randn(hidden, generator=generator).to(dtype)


def shared_buffers(folder: Path, rank: int, world_size: int, dtype: torch.dtype) -> PeerBuffers:
    """Files that every rank maps, so that each has its own addresses for the same memory."""

    def mapped(name: str, owner: int, shape: tuple[int, ...], of_dtype: torch.dtype) -> Tensor:
        path = f"{folder}/{name}-{owner}"
        return torch.from_file(path, shared=True, size=int(np.prod(shape)), dtype=of_dtype).view(shape)

    return PeerBuffers.build(
        rank,
        [mapped("data", owner, (2, MAX_ROWS, MAX_HIDDEN), dtype) for owner in range(world_size)],
        [mapped("signals", owner, (MAX_ROWS, world_size), torch.int64) for owner in range(world_size)],
        num_programs=2,  # fewer than rows: programs take several
    )


def sum_all_rounds(
    store: Store, rank: int, world_size: int, folder: Path
) -> dict[str, list[tuple[np.ndarray[Any, Any], ...]]]:
    """What each rank runs: all rounds of all scenarios."""
    assert "triton" not in sys.modules, "too late to interpret"
    os.environ["TRITON_INTERPRET"] = "1"
    from kvshard.kernels.triton.peer_all_reduce import all_reduce_add_rms_norm

    outcomes: dict[str, list[tuple[np.ndarray[Any, Any], ...]]] = {}
    for scenario, dtype in SCENARIOS.items():
        peers = shared_buffers(folder / scenario, rank, world_size, dtype)
        table = peers.data_table.clone()
        outcomes[scenario] = []
        for number in range(len(ROUNDS) if scenario in RIGHT else 2):
            xs, residual, weight = inputs(number, dtype, world_size)
            x = xs[rank]
            if scenario == "one rank's row is wrong" and rank == 1:
                x[-1] = x[-1] * 1.01
            if scenario == "a table names one rank twice" and rank == 0:
                peers.data_table[1] = table[0]
            if scenario == "a stale slot is read" and rank == 0:
                slot = (int(peers.sequence[0]) + 1) % 2
                peers.data_table[1] = table[1] + peers.data[0].nbytes * (1 if slot == 0 else -1)
            y = all_reduce_add_rms_norm(x, residual, weight, EPS, peers)
            outcomes[scenario].append((y.float().numpy(), residual.float().numpy()))
    return outcomes

"""Making peer buffers: real ranks and a real group; host memory stands in for what CUDA shares."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ranks import connect, run_ranks
from torch import Tensor
from torch.distributed import Store

from kvshard.kernels.peers import PeerBuffers
from kvshard.parallel import peer_buffers

SHAPE = (2, 3, 8)


def _export(x: Tensor) -> list[Any]:
    descriptor, size = x.untyped_storage()._share_fd_cpu_()  # type: ignore[attr-defined]
    return [os.getpid(), descriptor, size]


def _open(handle: Sequence[Any], device: torch.device) -> Tensor:
    process_id, descriptor, size = handle
    file = os.open(f"/proc/{process_id}/fd/{descriptor}", os.O_RDWR)
    storage = torch.UntypedStorage._new_shared_fd_cpu(file, size)  # type: ignore[attr-defined]
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _fail(*_: Any) -> Any:
    raise RuntimeError("peer access is not supported between these two devices")


def make(store: Store, rank: int, world_size: int, broken: str | None, on_device: list[str]) -> Any:
    """None, or what this rank reads of every rank's memory, and the number of programs."""
    peer_buffers._export = _fail if broken == "_export" and rank == 1 else _export
    peer_buffers._open = _fail if broken == "_open" and rank == 1 else _open
    peer_buffers._device_name = lambda device: on_device[rank]
    peer_buffers._num_multiprocessors = lambda device: 100
    group = connect(store, rank, world_size)
    peers = peer_buffers.connect_peer_buffers(group, max_rows=3, max_hidden=8, dtype=torch.bfloat16)
    if peers is None:
        return None
    assert (peers.data.shape, peers.data.dtype) == (SHAPE, torch.bfloat16)
    assert not peers.signals.any()
    group.barrier("all are zero")
    peers.data.fill_(rank + 1)
    for peer in range(world_size):
        peers.mapped[world_size + peer][2, rank] = 10 * peer + rank  # my word at each peer
    group.barrier("all have written")
    seen = [float(peers.mapped[peer][1, 2, 7]) for peer in range(world_size)]
    tables = [x.data_ptr() for x in peers.mapped]
    assert peers.data_table.tolist() + peers.signal_table.tolist() == tables
    words = peers.signals[2].tolist()
    group.barrier("all have read")
    return seen, words, peers.num_programs


def test_every_rank_reaches_the_memory_of_all() -> None:
    results = run_ranks(make, 3, None, ["a", "b", "a"])
    assert results == [
        ([1.0, 2.0, 3.0], [0, 1, 2], 50),
        ([1.0, 2.0, 3.0], [10, 11, 12], 100),
        ([1.0, 2.0, 3.0], [20, 21, 22], 50),
    ]


@pytest.mark.parametrize("broken", ["_export", "_open"])
def test_all_go_without_when_one_rank_cannot(broken: str) -> None:
    assert run_ranks(make, 2, broken, ["a", "b"]) == [None, None]


@pytest.mark.parametrize(
    ("data", "signals", "message"),
    [
        ([torch.zeros(2, 3, 8), torch.zeros(2, 3, 9)], [2, 2], "data of shape"),
        ([torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)], [2, 1], "signals of shape"),
        ([torch.zeros(2, 3, 8), torch.zeros(2, 3, 8).half()], [2, 2], "float16"),
    ],
)
def test_buffers_of_different_layout_are_refused(
    data: list[Tensor], signals: list[int], message: str
) -> None:
    words = [torch.zeros(3, count, dtype=torch.int64) for count in signals]
    with pytest.raises(AssertionError, match=message):
        PeerBuffers.build(0, data, words, 1)

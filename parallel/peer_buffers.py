"""Peer buffers for ranks that have GPUs of one host: each rank's memory mapped into all others over CUDA IPC.

Written from the documentation of CUDA (cudaIpcOpenMemHandle) and the source of torch (torch/csrc/StorageSharing.cpp).
It has not run on several GPUs; the tests replace the two CUDA calls, `_export` and `_open`, by host memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.peers import PeerBuffers
from .group import Group

_WHERE = "peer buffers"


def connect_peer_buffers(
    group: Group, *, max_rows: int, max_hidden: int, dtype: torch.dtype
) -> PeerBuffers | None:
    """Buffers for sums of up to [max_rows, max_hidden] of `dtype` on the group's device.

    Called by all ranks, with equal arguments. None on all of them if one could not share its memory or could not map
    another's (GPUs without peer access, another host, an allocator that does not share); NCCL is the way then.
    Raises GroupError as the group's collectives do.
    """
    data = torch.zeros(2, max_rows, max_hidden, dtype=dtype, device=group.device)
    signals = torch.zeros(max_rows, group.world_size, dtype=torch.int64, device=group.device)
    record: dict[str, Any] = {"device": _device_name(data.device)}
    try:
        record |= {"data": _export(data), "signals": _export(signals)}
    except RuntimeError as error:
        record["error"] = str(error)
    # A peer has this record only after the zeros above were written: both go through this rank's stream.
    records = _exchange(group, record)
    mapped: tuple[list[Tensor], list[Tensor]] | None = None
    if not any("error" in r for r in records):
        try:
            mapped = (
                _mapped(records, "data", group.rank, data),
                _mapped(records, "signals", group.rank, signals),
            )
        except RuntimeError:
            mapped = None
    if not all(_exchange(group, mapped is not None)) or mapped is None:
        return None
    sharing = sum(r["device"] == record["device"] for r in records)
    num_programs = max(_num_multiprocessors(data.device) // sharing, 1)
    return PeerBuffers.build(group.rank, *mapped, num_programs)


def _mapped(records: Sequence[dict[str, Any]], name: str, rank: int, mine: Tensor) -> list[Tensor]:
    """Every rank's tensor of that name, shaped as this rank's own."""
    return [
        mine if peer == rank else _open(record[name], mine.device).view(mine.dtype).view(mine.shape)
        for peer, record in enumerate(records)
    ]


def _exchange(group: Group, record: Any) -> list[Any]:
    """Every rank's record, by rank."""
    text = json.dumps(record).encode()
    lengths = group.all_gather(torch.tensor([len(text)], device=group.device), _WHERE).flatten().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = group.all_gather(padded.to(group.device), _WHERE).cpu()
    return [json.loads(bytes(row[:n].tolist())) for row, n in zip(rows, lengths, strict=True)]


def _export(x: Tensor) -> list[Any]:
    """What another process needs to map the memory of x, a tensor that is alone in its storage."""
    _, *handle = x.untyped_storage()._share_cuda_()
    return [part.hex() if isinstance(part, bytes) else part for part in handle]


def _open(handle: Sequence[Any], device: torch.device) -> Tensor:
    """The bytes behind another process's handle; `device` is the one that will read them.

    The memory is mapped for the device that is current at that moment, with peer access to the one it lies on. torch
    makes its first argument current, where its own use passes the device of the owner.
    """
    memory, size, offset, counter, counter_offset, event, wait_for_event = handle
    storage = torch.UntypedStorage._new_shared_cuda(
        device.index,
        bytes.fromhex(memory),
        size,
        offset,
        bytes.fromhex(counter),
        counter_offset,
        bytes.fromhex(event),
        wait_for_event,
    )
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _device_name(device: torch.device) -> str:
    """The same for ranks that share a GPU, and only for those."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

"""The control channel's vocabulary, shared by the coordinator and the shards.

A message is two frames: a one-byte kind and a payload. Plans and results carry their own
encoding (coordinator/plan.py); everything else is a msgpack map.
"""

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import msgpack


class Kind(bytes, Enum):
    """What a message says; the comment tells who sends it."""

    HELLO = b"h"  # shard: I run, this is my host, version and config
    START = b"s"  # coordinator: here are the store and the sizes; load and allocate
    READY = b"r"  # shard: send plans
    PLAN = b"p"  # coordinator: one encoded StepPlan
    RESULT = b"t"  # rank 0: one encoded StepResult
    CHECK = b"k"  # other ranks: (epoch, step_id, checksum)
    ERROR = b"e"  # shard: I failed, and why
    CLOSE = b"x"  # coordinator: stop
    WATCH = b"w"  # shard's watch thread: here I am
    HEALTH = b"a"  # coordinator to the watch thread, and its answer
    STACKS = b"b"  # coordinator to the watch thread, and its answer


def pack(values: Any) -> bytes:
    packed: bytes = msgpack.packb(values)
    return packed


def unpack(payload: bytes) -> Any:
    return msgpack.unpackb(payload)


@dataclass(frozen=True)
class CurveKeys:
    """CURVE keys of one job (Z85 text): only holders of the client's secret may connect."""

    server_public: str
    client_public: str
    client_secret: str


@dataclass(frozen=True)
class Hello:
    """What a shard says first."""

    version: str  # of kvshard
    config_hash: str
    host: str
    host_id: str  # equal for processes that may share memory
    device_id: str  # equal for shards whose memory is one and the same: the GPU's, or the host's
    pid: int
    num_cores: int  # that this process may use
    memory_bytes: int  # of its device; on the CPU, of its host
    store: str  # host:port of the rendezvous store; only rank 0 has one


@dataclass(frozen=True)
class Start:
    """What the coordinator decides once all shards are there; the same for every rank."""

    store: str
    num_blocks: int
    max_model_len: int
    threads: tuple[int, ...]  # CPU threads of each rank


@dataclass(frozen=True)
class ShardJob:
    """All a shard process is told before it connects."""

    job_id: str
    epoch: int
    rank: int
    world_size: int
    endpoint: str  # of the coordinator's ROUTER socket
    curve: CurveKeys | None  # None on ipc, where the socket's folder is private
    config_json: str  # the resolved JobConfig
    model_path: str  # as the coordinator resolved it; every host must see it
    device: str  # cpu, or cuda:<index as this process counts them>
    store_host: str  # name or address under which rank 0's host is reached by the others

    def to_bytes(self) -> bytes:
        return pack(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> "ShardJob":
        values = unpack(data)
        if values["curve"] is not None:
            values["curve"] = CurveKeys(**values["curve"])
        return cls(**values)

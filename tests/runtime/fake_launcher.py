"""Shards that say the right words on the control channel, as threads, and compute nothing."""

import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import zmq

import kvshard
from kvshard.runtime.config import JobConfig, config_hash
from kvshard.runtime.coordinator.channel import shard_identity, watch_identity
from kvshard.runtime.coordinator.executor import ShardInfo
from kvshard.runtime.coordinator.launcher import Placement
from kvshard.runtime.coordinator.plan import StepResult, decode_plan, encode_result
from kvshard.runtime.errors import ConfigError
from kvshard.runtime.messages import Hello, Kind, ShardJob, Start, pack, unpack

WAIT_S = 20.0
SIZE = 3


@dataclass
class Behaviour:
    """How one fake shard differs from a good one."""

    hello: dict[str, Any] | None = field(default_factory=dict)  # what differs; None says nothing
    error: dict[str, Any] | None = None  # instead of results
    error_when_asked: dict[str, Any] | None = None  # instead of an answer to its watch thread
    token: int = 7
    answers_plans: bool = True
    answers_health: bool = True


class FakeLauncher:
    """Threads that say the right words on the control channel."""

    def __init__(
        self, config: JobConfig, behaviours: dict[int, Behaviour], place_error: str | None = None
    ) -> None:
        self._config = config
        self._behaviours = [behaviours.get(rank, Behaviour()) for rank in range(SIZE)]
        self._place_error = place_error
        self._threads: list[threading.Thread] = []
        self._context = zmq.Context()
        self.starts: list[Start] = []
        self.ended: dict[int, str] = {}
        self.closed = False

    def place(self, device: str) -> list[Placement]:
        if self._place_error is not None:
            raise ConfigError(self._place_error)
        return [Placement("here", True, device) for _ in self._behaviours]

    def start(self, jobs: list[ShardJob]) -> None:
        for job, behaviour in zip(jobs, self._behaviours, strict=True):
            thread = threading.Thread(target=self._serve, args=(job, behaviour), daemon=True)
            thread.start()
            self._threads.append(thread)

    def dead(self) -> dict[int, str]:
        return self.ended

    def close(self, timeout_s: float) -> None:
        self.closed = True
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive(), "a shard was not told to close"
        self._context.destroy(linger=0)

    def _dealer(self, job: ShardJob, identity: bytes) -> "zmq.Socket[bytes]":
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)  # a message that nobody takes is not to hold up the context's end
        dealer.setsockopt(zmq.IDENTITY, identity)
        dealer.connect(job.endpoint)
        return dealer

    def _serve(self, job: ShardJob, behaviour: Behaviour) -> None:
        link, watch = (
            self._dealer(job, name) for name in (shard_identity(job.rank), watch_identity(job.rank))
        )
        watch.send_multipart((Kind.WATCH.value, b""))
        hello = Hello(
            kvshard.__version__,
            config_hash(self._config),
            f"node{job.rank}",
            "id",
            "id",
            1,
            4,
            900,
            "store:1",
        )
        if behaviour.hello is not None:
            link.send_multipart((Kind.HELLO.value, pack(asdict(hello) | behaviour.hello)))
        poller = zmq.Poller()
        poller.register(link, zmq.POLLIN)
        poller.register(watch, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if watch in ready:
                kind, _ = watch.recv_multipart()
                answer = (
                    {"last_step_id": job.rank, "peak_memory_bytes": 5}
                    if kind == Kind.HEALTH.value
                    else "a stack"
                )
                if behaviour.error_when_asked is not None:
                    link.send_multipart((Kind.ERROR.value, pack(behaviour.error_when_asked)))
                elif behaviour.answers_health:
                    watch.send_multipart((kind, pack(answer)))
            if link not in ready:
                continue
            kind, payload = link.recv_multipart()
            if kind == Kind.CLOSE.value:
                return
            for answer_kind, data in self._answer(job.rank, behaviour, kind, payload):
                link.send_multipart((answer_kind.value, data))

    def _answer(
        self, rank: int, behaviour: Behaviour, kind: bytes, payload: bytes
    ) -> Iterator[tuple[Kind, bytes]]:
        if kind == Kind.START.value:
            self.starts.append(Start(**unpack(payload)))
            info = ShardInfo(rank, f"node{rank}", 1, "cpu", 2, 1, 10, 20, 8, "gloo", 1)
            yield Kind.READY, pack(asdict(info))
        elif behaviour.error is not None:
            yield Kind.ERROR, pack(behaviour.error)
        elif behaviour.answers_plans:
            plan = decode_plan(payload)
            tokens = np.full(plan.num_rows, behaviour.token, np.int32)
            result = StepResult(plan.epoch, plan.step_id, tokens, None)
            if rank == 0:
                yield Kind.RESULT, encode_result(result)
            else:
                yield Kind.CHECK, pack((plan.epoch, plan.step_id, result.checksum()))

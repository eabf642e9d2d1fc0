"""The executor of shards in other processes: one control channel, whatever started them."""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import kvshard

from ..config import JobConfig, config_hash
from ..errors import ConfigError, ShardError
from ..messages import Hello, Kind, ShardJob, Start, pack, unpack
from .channel import ControlChannel, PeerGone, interface_address, shard_identity, watch_identity
from .executor import ShardHealth, ShardInfo
from .launcher import Launcher, Placement
from .plan import StepPlan, StepResult, decode_result, encode_plan

POLL_S = 0.1  # how often the launcher is asked who died while nothing arrives
BLAME_S = 2.0  # a collective that broke is reported after this long, unless its cause shows up before
ANSWER_S = 5.0  # for health and stacks


@dataclass(frozen=True)
class CacheSize:
    """What the coordinator decides about the cache once it knows every shard's memory."""

    num_blocks: int
    max_model_len: int


class RemoteExecutor:
    """Plans out to every rank, rank 0's result back, every other rank's checksum against it."""

    def __init__(
        self,
        launcher: Launcher,
        config: JobConfig,
        model_path: str,
        size_cache: Callable[[list[int]], CacheSize],
    ) -> None:
        """`size_cache` is given each rank's share of its device's or host's memory, in bytes."""
        self._launcher = launcher
        self._config = config
        self._model_path = model_path
        self._size_cache = size_cache
        self._channel: ControlChannel | None = None
        self._hosts = ["?"] * config.tensor_parallel_size
        self._arrived: dict[int, StepResult] = {}  # by step_id: rank 0's
        self._checks: dict[int, list[tuple[int, int]]] = {}  # by step_id: (rank, checksum) of the others
        self._next_step = 0
        self._started = False

    def launch(self) -> None:
        config = self._config
        placements = self._launcher.place(config.device)
        self._hosts = [placement.host for placement in placements]
        address = self._address(placements)
        self._channel = ControlChannel(
            address=address,
            high_water_mark=config.scheduler.run_ahead + 16,
            send_timeout_s=config.timeouts.step_s,
        )
        job_id, store_host = secrets.token_hex(4), _store_host(placements, address)
        self._launcher.start(
            [self._job(job_id, rank, placements, store_host) for rank in range(len(placements))]
        )

    def start(self) -> list[ShardInfo]:
        if self._channel is None:
            self.launch()
        config = self._config
        deadline = time.monotonic() + config.timeouts.start_s
        hellos = {rank: Hello(**unpack(p)) for rank, p in self._collect(Kind.HELLO, deadline)}
        self._check_agreement(hellos)
        per_host = Counter(hello.host_id for hello in hellos.values())
        per_device = Counter(hello.device_id for hello in hellos.values())
        ranks = sorted(hellos)
        memory = [hellos[r].memory_bytes // per_device[hellos[r].device_id] for r in ranks]
        size = self._size_cache(memory)
        threads = tuple(
            config.threads_per_shard or max(1, hellos[r].num_cores // per_host[hellos[r].host_id])
            for r in ranks
        )
        start = Start(hellos[0].store, size.num_blocks, size.max_model_len, threads)
        self._broadcast(Kind.START, pack(vars(start)))
        ready = {rank: ShardInfo(**unpack(p)) for rank, p in self._collect(Kind.READY, deadline)}
        self._started = True
        return [ready[rank] for rank in ranks]

    def submit(self, plan: StepPlan) -> None:
        self._broadcast(Kind.PLAN, encode_plan(plan))

    def result(self) -> StepResult:
        """The next result, once every rank has come to the same tokens. Raises ShardError."""
        deadline = time.monotonic() + self._config.timeouts.step_s
        others = self._config.tensor_parallel_size - 1
        step_id = self._next_step
        while step_id not in self._arrived or len(self._checks.get(step_id, ())) < others:
            late = f"no result within timeouts.step_s={self._config.timeouts.step_s:g} s"
            self._keep(*self._receive(deadline, late, ranks=set(range(others + 1))))
        result = self._arrived.pop(step_id)
        expected = result.checksum()
        for rank, checksum in self._checks.pop(step_id, ()):
            if checksum != expected:
                raise self._error(rank, "it sampled other tokens than rank 0; the shards have diverged")
        self._next_step += 1
        return result

    def health(self) -> list[ShardHealth]:
        return [ShardHealth(rank, **unpack(p)) for rank, p in self._ask_watchers(Kind.HEALTH)]

    def stacks(self) -> dict[int, str]:
        return {rank: unpack(p) for rank, p in self._ask_watchers(Kind.STACKS)}

    def close(self) -> None:
        if self._channel is not None:
            for rank in range(self._config.tensor_parallel_size):
                try:
                    self._channel.send(shard_identity(rank), Kind.CLOSE, b"")
                except PeerGone:
                    continue  # that is what closing is for
        # Shards that are still loading would read the message too late to be worth waiting for.
        self._launcher.close(self._config.timeouts.close_s if self._started else 0.0)
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _address(self, placements: list[Placement]) -> str | None:
        elsewhere = [placement.host for placement in placements if not placement.same_host]
        return interface_address(self._config.network.interface, elsewhere[0]) if elsewhere else None

    def _job(self, job_id: str, rank: int, placements: list[Placement], store_host: str) -> ShardJob:
        assert self._channel is not None, "the channel is bound before jobs are made"
        return ShardJob(
            job_id=job_id,
            epoch=0,
            rank=rank,
            world_size=len(placements),
            endpoint=self._channel.endpoint,
            curve=self._channel.curve,
            config_json=self._config.model_dump_json(),
            model_path=self._model_path,
            device=placements[rank].device,
            store_host=store_host,
        )

    def _check_agreement(self, hellos: dict[int, Hello]) -> None:
        expected = config_hash(self._config)
        for rank, hello in sorted(hellos.items()):
            if hello.version != kvshard.__version__:
                raise ConfigError(
                    f"shard {rank} on {hello.host} runs kvshard {hello.version} and the coordinator "
                    f"{kvshard.__version__}; install the same version on every host"
                )
            if hello.config_hash != expected:
                raise ConfigError(
                    f"shard {rank} on {hello.host} reads the job's settings otherwise than the coordinator; "
                    "install the same build of kvshard on every host"
                )
            self._hosts[rank] = hello.host

    def _broadcast(self, kind: Kind, payload: bytes) -> None:
        assert self._channel is not None, "start() comes first"
        for rank in range(self._config.tensor_parallel_size):
            try:
                self._channel.send(shard_identity(rank), kind, payload)
            except PeerGone:
                raise self._blame(rank, "it is no longer connected", victims=set()) from None

    def _collect(self, kind: Kind, deadline: float) -> Iterator[tuple[int, bytes]]:
        """One message of `kind` from every rank."""
        missing = set(range(self._config.tensor_parallel_size))
        while missing:
            limit_s = self._config.timeouts.start_s
            late = f"shards {sorted(missing)} were not ready within timeouts.start_s={limit_s:g} s"
            rank, got, payload = self._receive(deadline, late, missing)
            if got is kind:
                missing.discard(rank)
                yield rank, payload

    def _receive(self, deadline: float, late: str, ranks: set[int]) -> tuple[int, Kind, bytes]:
        """The next message that is no error.

        Raises what a shard reported, or ShardError for a dead shard, or with `late` for the slowest of `ranks`.
        """
        assert self._channel is not None, "start() comes first"
        while True:
            message = self._channel.receive(POLL_S)
            if message is not None:
                rank, kind, payload = message
                if kind is Kind.ERROR:
                    raise self._reported(rank, unpack(payload))
                return message
            for rank, reason in self._launcher.dead().items():
                raise self._blame(rank, reason, victims=set())
            if time.monotonic() > deadline:
                raise self._error(self._slowest(ranks), late)

    def _reported(self, rank: int, report: dict[str, Any]) -> ConfigError | ShardError:
        """The error a shard sent; a broken collective is blamed on the rank that broke it."""
        if report["cause"] == "config":
            return self._config_error(rank, report["message"])
        if report["cause"] == "group":
            missing = report["missing"]
            return self._blame(missing[0] if missing else rank, report["message"], victims={rank})
        return self._error(rank, report["message"])

    def _blame(self, rank: int, symptom: str, victims: set[int]) -> ConfigError | ShardError:
        """Look for the cause of a symptom for a moment: a report from a shard, or a process that died.

        `victims` ended because of another's fault, which they reported.
        """
        assert self._channel is not None, "start() comes first"
        deadline = time.monotonic() + BLAME_S
        while time.monotonic() < deadline:
            # Asked before the messages are read: a rank that is dead by now has had its say.
            dead = self._launcher.dead()
            while (message := self._channel.receive(POLL_S)) is not None:
                if message[1] is not Kind.ERROR:
                    continue
                report = unpack(message[2])
                if report["cause"] == "config":
                    return self._config_error(message[0], report["message"])
                if report["cause"] == "shard":
                    return self._error(message[0], report["message"])
                victims.add(message[0])
            for dead_rank, reason in dead.items():
                if dead_rank not in victims:
                    return self._error(dead_rank, reason)
        return self._error(rank, symptom)

    def _slowest(self, ranks: set[int]) -> int:
        """The one of `ranks` to name when they are late: whose watch thread saw the fewest steps, or is silent."""
        health = {answer.rank: answer.last_step_id for answer in self.health()}
        return min(sorted(ranks), key=lambda rank: health.get(rank, -2))

    def _config_error(self, rank: int, message: str) -> ConfigError:
        """What a shard found wrong with the job; over several hosts it matters on which."""
        here = f"shard {rank} on {self._hosts[rank]}: " if len(set(self._hosts)) > 1 else ""
        return ConfigError(here + message)

    def _error(self, rank: int, cause: str) -> ShardError:
        return ShardError(rank, self._hosts[rank], self._next_step, cause)

    def _ask_watchers(self, kind: Kind) -> list[tuple[int, bytes]]:
        """Ask every watch thread; keep what arrives of results meanwhile. Raises what a shard reports."""
        assert self._channel is not None, "start() comes first"
        waiting = set()
        for rank in range(self._config.tensor_parallel_size):
            try:
                self._channel.send(watch_identity(rank), kind, b"")
                waiting.add(rank)
            except PeerGone:
                continue  # a shard that is gone gives no answer; the caller sees it missing
        answers = []
        deadline = time.monotonic() + ANSWER_S
        while waiting and (left := deadline - time.monotonic()) > 0:
            message = self._channel.receive(left)
            if message is None:
                break
            rank, got, payload = message
            if got is Kind.ERROR:  # its watch thread may have ended with it, and would count as silent
                raise self._reported(rank, unpack(payload))
            if got is kind:
                waiting.discard(rank)
                answers.append((rank, payload))
            else:
                self._keep(rank, got, payload)
        return sorted(answers)

    def _keep(self, rank: int, kind: Kind, payload: bytes) -> None:
        """Put aside what belongs to a step's result."""
        if kind is Kind.RESULT:
            result = decode_result(payload)
            self._arrived[result.step_id] = result
        elif kind is Kind.CHECK:
            _, step_id, checksum = unpack(payload)
            self._checks.setdefault(step_id, []).append((rank, checksum))


def _store_host(placements: list[Placement], address: str | None) -> str:
    """How shards reach the host of rank 0. Its own name may mean loopback there, so an address that others reach comes first."""
    if all(placement.host == placements[0].host for placement in placements):
        return "127.0.0.1"
    return address if address is not None and placements[0].same_host else placements[0].host

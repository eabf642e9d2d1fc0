"""Shards as torchrun's workers. torchrun starts and watches them; rank 0 also spawns the coordinator.

    kvshard run JOB.yaml                                     starts torchrun on this host
    torchrun --nproc-per-node 3 -m kvshard run JOB.yaml      joins it

The coordinator is a child process of rank 0, so that tokenising and file work never hold up a
launch. Rank 0 tells it where the workers are through its stdin, gets the shards' jobs back through
a pipe and hands them to the workers through torchrun's store.
"""

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistError, Store, rendezvous

from ..runtime.config import JobConfig
from ..runtime.coordinator.launcher import Placement
from ..runtime.errors import ConfigError
from ..runtime.messages import ShardJob, pack, unpack
from ..runtime.shard.main import run_shard

LENGTH = struct.Struct("<I")
NO_JOB = b"-"
JOIN_S = 120.0  # for all workers to come to the store, in seconds


def inside_torchrun() -> bool:
    """Whether this process is a worker of torchrun (or of anything that sets its variables)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_torchrun(config: JobConfig, arguments: list[str]) -> int:
    """Run `kvshard run ARGUMENTS` under a torchrun on this host; returns the job's exit code."""
    with tempfile.TemporaryDirectory(prefix="kvshard-") as folder:
        report = Path(folder) / "exit_code"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(config.tensor_parallel_size)]
        command += ["-m", "kvshard", "run", *arguments, "--report-exit-code", str(report)]
        agent = subprocess.Popen(command)
        previous = {s: signal.signal(s, lambda *_: agent.terminate()) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = agent.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return int(report.read_text()) if report.exists() else (status and 2)


def join_torchrun(config: JobConfig, options: dict[str, Any], report: Path | None) -> int:
    """Be one worker: run this rank's shard, and on rank 0 the coordinator beside it.

    `options` are handed to the coordinator's `execute_job`. Returns the exit code of this process:
    the job's on rank 0, unless it is to be written to `report`; 0 elsewhere.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size != config.tensor_parallel_size:
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size} and torchrun started {world_size} workers; "
            "make them equal (torchrun --nproc-per-node times --nnodes)"
        )
    store = _store()
    store.set(f"kvshard/place/{rank}", pack([_address(), int(os.environ.get("LOCAL_RANK", "0"))]))
    if rank == 0:
        return _run_rank_zero(config, options, report, store, world_size)
    # The agent ends workers by SIGTERM; a shard ends when the coordinator says so or is gone.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = _wait(store, f"kvshard/job/{rank}", config.timeouts.start_s)
    if job != NO_JOB:
        _run_shard(ShardJob.from_bytes(job))
    return 0


def _run_rank_zero(
    config: JobConfig, options: dict[str, Any], report: Path | None, store: Store, world_size: int
) -> int:
    places = [unpack(_wait(store, f"kvshard/place/{rank}", JOIN_S)) for rank in range(world_size)]
    read_end, write_end = os.pipe()
    coordinator = subprocess.Popen(
        [sys.executable, "-m", "kvshard.launch.torchrun", str(write_end)],
        stdin=subprocess.PIPE,
        pass_fds=(write_end,),
        start_new_session=True,  # it outlives the agent's kill, to report what happened
    )
    os.close(write_end)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: coordinator.terminate())
    assert coordinator.stdin is not None, "stdin is a pipe"
    request = pack([config.model_dump_json(), options, places])
    coordinator.stdin.write(LENGTH.pack(len(request)) + request)
    coordinator.stdin.flush()  # and kept open: its end tells the coordinator that rank 0 is gone
    with os.fdopen(read_end, "rb") as source:
        data = source.read()  # until the coordinator has sent the jobs, or ended without any
    jobs = unpack(data) if data else [NO_JOB] * world_size
    for rank, job in enumerate(jobs):
        store.set(f"kvshard/job/{rank}", job)
    if jobs[0] != NO_JOB:
        _run_shard(ShardJob.from_bytes(jobs[0]))
    code = coordinator.wait()
    if report is None:
        return code
    report.write_text(str(code))
    return 0


def _run_shard(job: ShardJob) -> None:
    try:
        run_shard(job)
    except SystemExit:
        return  # reported to the coordinator, whose exit code is the job's


def _store() -> Store:
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=JOIN_S))))
    except (DistError, ValueError, OSError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"cannot open torchrun's store at MASTER_ADDR:MASTER_PORT {where}: {error}; "
            "is the port in use by another job? give torchrun another --master-port"
        ) from None
    assert isinstance(store, Store), "env:// gives a store"
    return store


def _wait(store: Store, key: str, timeout_s: float) -> bytes:
    try:
        store.wait([key], timedelta(seconds=timeout_s))
    except DistError:
        raise ConfigError(f"torchrun's workers did not all start within {timeout_s:g} s: {key} is missing") from None
    value: bytes = store.get(key)
    return value


def _address() -> str:
    """Name of this host as the others reach it; localhost when torchrun runs on one host."""
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        return "localhost"
    if os.environ.get("GROUP_RANK", "0") == "0":
        return os.environ["MASTER_ADDR"]
    return socket.getfqdn()


class TorchrunLauncher:
    """The coordinator's side: the workers run already, they only wait for their jobs."""

    def __init__(self, places: list[tuple[str, int]], jobs_fd: int) -> None:
        self._places = places
        self._jobs_fd = jobs_fd

    def place(self, device: str) -> list[Placement]:
        cuda = device == "cuda"
        return [
            Placement(host, host == self._places[0][0], f"cuda:{local_rank}" if cuda else "cpu")
            for host, local_rank in self._places
        ]

    def start(self, jobs: list[ShardJob]) -> None:
        with os.fdopen(self._jobs_fd, "wb") as sink:
            sink.write(pack([job.to_bytes() for job in jobs]))

    def dead(self) -> dict[int, str]:
        """Only rank 0 is seen from here; torchrun ends it when any other worker dies."""
        if select.select([sys.stdin.buffer], [], [], 0)[0]:
            return {0: "torchrun ended the workers; its own log names the first that failed"}
        return {}

    def close(self, timeout_s: float) -> None:
        """The workers end by themselves, and torchrun watches them."""


def main() -> int:
    """The coordinator child of rank 0."""
    from .run import execute_job

    source = sys.stdin.buffer
    config_json, options, places = unpack(source.read(LENGTH.unpack(source.read(LENGTH.size))[0]))
    config = JobConfig.model_validate_json(config_json)
    launcher = TorchrunLauncher([(host, local_rank) for host, local_rank in places], int(sys.argv[1]))
    return execute_job(config, launcher=launcher, **options)


if __name__ == "__main__":
    sys.exit(main())

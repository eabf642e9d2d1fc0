"""Shards as torchrun's workers. torchrun starts and watches them; rank 0 also spawns the coordinator.

    kvshard run JOB.yaml                                     is torchrun, on this host
    torchrun --nproc-per-node 3 -m kvshard run JOB.yaml      joins it

The coordinator is a child process of rank 0, so that tokenising and file work never hold up a
launch. Rank 0 tells it where the workers are through its stdin, gets the shards' jobs back through
a pipe and hands them to the workers through torchrun's store.
"""

import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistError, Store, rendezvous
from torch.distributed import run as torch_run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from ..runtime.config import JobConfig
from ..runtime.coordinator.launcher import Placement
from ..runtime.errors import ConfigError, ShardError
from ..runtime.messages import ShardJob, pack, unpack
from ..runtime.shard.main import run_shard
from .run import EXIT_INTERRUPTED, EXIT_JOB_ERROR, GO_ON, execute_job

LENGTH = struct.Struct("<I")
NO_JOB = b"-"
JOB_S = 7 * 24 * 3600.0  # for a model to be downloaded before; torchrun ends who waits if rank 0 ends
JOIN_S = 120.0  # for all workers to come to the store, in seconds
PR_SET_PDEATHSIG = 1  # of Linux's prctl
ENDED = "torchrun ended the workers; its own log names the first that failed"


def inside_torchrun() -> bool:
    """Whether this process is a worker of torchrun (or of anything that sets its variables)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_torchrun(config: JobConfig, arguments: list[str]) -> int:
    """Run `kvshard run ARGUMENTS` as torchrun's workers on this host; returns the job's exit code.

    This process is torchrun's agent itself: nothing runs on when it is killed.
    """
    options = ["--standalone", "--nproc-per-node", str(config.tensor_parallel_size)]
    options += ["--signals-to-handle", "SIGTERM"]
    with tempfile.TemporaryDirectory(prefix="kvshard-") as folder:
        report = Path(folder) / str(os.getpid())
        command = ["-m", "kvshard", "run", *arguments, "--report-exit-code", str(report)]
        # As torchrun would, after a warning; a shard sets its own number of threads.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the agent sets its own
        # The agent hands on the signal it got, and SIGINT would show as tracebacks of workers that still import.
        signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
        failures: dict[int, ProcessFailure] = {}
        try:
            torch_run.run(torch_run.parse_args([*options, *command]))
        except SignalException:
            pass  # the workers have ended by now
        except ChildFailedError as error:
            failures = error.failures
        code = int(report.read_text()) if report.exists() else EXIT_INTERRUPTED
    # A coordinator that torchrun stops because a worker died cannot tell that from a user's Ctrl-C.
    if failures and code == EXIT_INTERRUPTED:
        rank, failed = min(failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp))
        reason = failed.signal_name() if failed.exitcode < 0 else f"exit code {failed.exitcode}"
        print(f"Error: shard {rank} was lost ({reason}).\n{GO_ON}", file=sys.stderr)
        return EXIT_JOB_ERROR
    return code


def join_torchrun(config: JobConfig, options: dict[str, Any], report: Path | None) -> int:
    """Be one worker: run this rank's shard, and on rank 0 the coordinator beside it.

    `options` are handed to the coordinator's `execute_job`. Returns the exit code of this process:
    the job's on rank 0, unless it is to be written to `report`; 0 elsewhere. `report` bears the
    process id of the agent as its name.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size != config.tensor_parallel_size:
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size} and torchrun started {world_size} workers; "
            "make them equal (torchrun --nproc-per-node times --nnodes)"
        )
    _end_with_parent(None if report is None else int(report.name))
    store: Any = _store()  # its annotation of set() leaves out bytes
    store.set(f"kvshard/place/{rank}", pack([_address(), int(os.environ.get("LOCAL_RANK", "0"))]))
    if rank == 0:
        return _run_rank_zero(config, options, report, store, world_size)
    # The agent ends workers by SIGTERM; a shard ends when the coordinator says so or is gone.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = _wait(store, f"kvshard/job/{rank}", JOB_S)
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
    if code < 0:
        print(f"Error: the coordinator was killed by {signal.Signals(-code).name}.\n{GO_ON}", file=sys.stderr)
        code = EXIT_JOB_ERROR
    if report is None:
        return code
    report.write_text(str(code))
    return 0


def _end_with_parent(agent: int | None) -> None:
    """Have this process killed when torchrun's agent dies, which cannot end its workers then.

    `agent` is its process id if that is known: it may be dead already.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if agent is not None and os.getppid() != agent:
        os._exit(EXIT_JOB_ERROR)


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
        raise ConfigError(
            f"torchrun's workers did not all start within {timeout_s:g} s: {key} is missing"
        ) from None
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
        self._started = False
        self._rank_zero_gone = threading.Event()
        threading.Thread(target=self._watch_rank_zero, name="rank-zero-watch", daemon=True).start()

    def place(self, device: str) -> list[Placement]:
        cuda = device == "cuda"
        return [
            Placement(host, host == self._places[0][0], f"cuda:{local_rank}" if cuda else "cpu")
            for host, local_rank in self._places
        ]

    def start(self, jobs: list[ShardJob]) -> None:
        try:
            with os.fdopen(self._jobs_fd, "wb") as sink:
                sink.write(pack([job.to_bytes() for job in jobs]))
        except BrokenPipeError:
            raise ShardError(0, self._places[0][0], 0, ENDED) from None
        self._started = True

    def dead(self) -> dict[int, str]:
        """Only rank 0 is seen from here; torchrun ends it when any other worker dies."""
        return {0: ENDED} if self._rank_zero_gone.is_set() else {}

    def close(self, timeout_s: float) -> None:
        """The workers end by themselves, and torchrun watches them."""

    def _watch_rank_zero(self) -> None:
        os.read(sys.stdin.fileno(), 1)  # returns when rank 0 has ended
        self._rank_zero_gone.set()
        if not self._started:
            os._exit(EXIT_JOB_ERROR)  # in the middle of imports and files, and with nothing to save


def main() -> int:
    """The coordinator child of rank 0."""
    source = sys.stdin.buffer
    config_json, options, places = unpack(source.read(LENGTH.unpack(source.read(LENGTH.size))[0]))
    config = JobConfig.model_validate_json(config_json)
    launcher = TorchrunLauncher([(host, local_rank) for host, local_rank in places], int(sys.argv[1]))
    return execute_job(config, launcher=launcher, **options)


if __name__ == "__main__":
    sys.exit(main())

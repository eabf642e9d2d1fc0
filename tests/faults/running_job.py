"""A job in processes of its own, to be watched, stopped and killed from outside."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
from jobs import command, environment, read_output, write_job
from models_factory import make_llama, save_word_tokenizer
from other_processes import Steady, num_sockets, segments, stop

T = TypeVar("T")
NUM_ROWS = 40
MAX_TOKENS = 30
NUM_SHORT = 12  # rows of a long job that end at once
LONGER = 100  # tokens that each of the others has more than the one before
START_S = 180  # until something that must happen has happened, on a busy machine
GONE_S = 10.0  # until nothing of a killed job is left
POLL_S = 0.02


def make_tiny_model(path: Path, **overrides: Any) -> Path:
    """A random Llama of 6 query heads with a tokenizer of words."""
    make_llama(path, **{"max_position_embeddings": 4096} | overrides)
    save_word_tokenizer(path)
    return path


def write_long_job(folder: Path, model: Path, launcher: str, size: int, **settings: Any) -> Path:
    """NUM_ROWS rows, four at a time: NUM_SHORT short ones, then results one after another for some 20 s, far longer
    than a test takes to disturb the job."""
    config: dict[str, Any] = {
        "model": str(model),
        "launcher": launcher,
        "tensor_parallel_size": size,
        "device": "cpu",
        "threads_per_shard": 1,
        "cache": {"num_blocks": 1024},
        "scheduler": {"max_num_seqs": 4},
        "sampling": {"max_tokens": MAX_TOKENS, "ignore_eos": True, "temperature": 0.0},
    }
    rows = [row | {"max_tokens": _long(number)} for number, row in enumerate(_rows())]
    return write_job(folder, config | settings, rows)


def _rows() -> list[dict[str, Any]]:
    return [{"id": f"row{i}", "prompt": f"w{3 + i} w5 w6"} for i in range(NUM_ROWS)]


def _long(number: int) -> int:
    """Tokens of row `number` in a long job."""
    return MAX_TOKENS + LONGER * max(number - NUM_SHORT + 1, 0)


def shorten(job: Path) -> None:
    """The rows that have not run yet become short ones."""
    (job.parent / "input.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows()))


def complete(job: Path, launcher: str, size: int, temp: Path) -> str:
    """Run the job's remaining rows by the same command; returns what it printed."""
    shorten(job)
    with RunningJob(job, launcher, size, temp) as run:
        assert run.wait() == 0, run.log()
        run.assert_nothing_left()
    assert_complete(job.parent)
    return run.log()


def assert_complete(folder: Path) -> None:
    """Every row is in the output once, with all its tokens."""
    rows = read_output(folder / "output.jsonl")
    assert sorted(rows) == sorted(f"row{i}" for i in range(NUM_ROWS))
    for number in range(NUM_ROWS):
        line = rows[f"row{number}"]
        assert line["error"] is None, line
        count = line["response"]["body"]["usage"]["completion_tokens"]
        assert count in (MAX_TOKENS, _long(number)), f"row{number} has {count} tokens"


class RunningJob:
    """`kvshard run` in a session of its own, as from a terminal. Ended in any case when the context is left.

    temp: its TMPDIR, by which every process of the job is known.
    """

    def __init__(self, job: Path, launcher: str, size: int, temp: Path) -> None:
        self.folder = job.parent
        self._launcher = launcher
        self._size = size
        self._temp = temp
        self._log = self.folder / f"log-{time.monotonic_ns()}.txt"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command(job),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment() | {"TMPDIR": str(temp)},
                start_new_session=True,
            )

    def __enter__(self) -> "RunningJob":
        return self

    def __exit__(self, *_: object) -> None:
        for process in [psutil.Process(self.process.pid)] if self.process.poll() is None else []:
            process.kill()
        self.process.wait(GONE_S)
        for process in self.left():
            process.kill()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], T], what: str, timeout_s: float = START_S) -> T:
        """The first true value of `condition`, while the job runs."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            code = self.process.poll()
            assert code is None, f"ended with {code} before {what}:\n{self.log()}"
            assert time.monotonic() < deadline, f"no {what} in {timeout_s} s:\n{self.log()}"
            time.sleep(POLL_S)
        return value

    def wait(self, timeout_s: float = START_S) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.log()}") from None

    def num_lines(self) -> int:
        path = self.folder / "output.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for_shards(self) -> list[psutil.Process]:
        """The processes of all shards; in the order of ranks, except with ray."""
        return self.wait_for(
            lambda: self._shards() if len(self._shards()) == self._size else None, "shard processes"
        )

    def wait_for_rows(self, count: int = 8) -> None:
        self.wait_for(lambda: self.num_lines() >= count, f"{count} finished rows")
        assert self.num_lines() < NUM_ROWS, "the job was over too soon to be disturbed"

    def interrupt(self, number: signal.Signals) -> None:
        """SIGINT goes to the whole process group, as a terminal does it; others to the one process."""
        if number is signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(GONE_S)

    def left(self) -> list[psutil.Process]:
        """Processes of this job that still run."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def assert_nothing_left(self, segment: str | None = None) -> None:
        """Processes, sockets and the shared segment are gone in time."""
        deadline = time.monotonic() + GONE_S
        while time.monotonic() < deadline and self.left():
            time.sleep(POLL_S)
        lines = [f"{p.pid} {p.status()} {' '.join(p.cmdline())}" for p in self.left()]
        assert not lines, "\n".join(["still running:", *lines, self.log()])
        sockets = self._temp / f"kvshard-{os.getuid()}"
        assert not sockets.exists() or not list(sockets.iterdir())
        assert not [name for name in os.listdir("/dev/shm") if "kvshard" in name]
        if segment is not None:
            assert not [p.pid for p in psutil.process_iter() if segment in segments(p.pid)]

    def stop_before_attaching(self) -> str:
        """Stop the last of three shards between the creation of the shared segment and its attaching.

        Returns the segment's name. Shards wait for each other at two places, and a shard that waits can be
        stopped there: nobody starts before all have said hello to the coordinator, and rank 0 creates the
        segment when all others have said hello in the group's store.
        """
        first, second, last = self._hold_last_before_hello()
        sockets = num_sockets(second.pid)
        self.wait_for(Steady(second, sockets), "shard that waits for its start")
        self.wait_for(Steady(self._coordinator()), "coordinator that waits for the last shard")
        stop(second)
        last.resume()
        self.wait_for(Steady(last, sockets + 1), "shard that has said hello in the group's store")
        stop(last)
        second.resume()
        segment = self.wait_for(lambda: next(iter(segments(first.pid)), None), "shared segment")
        assert segment not in segments(last.pid)
        return segment

    def _hold_last_before_hello(self) -> list[psutil.Process]:
        """The shards, the last of them stopped, the others connected to the coordinator."""
        control = 2  # sockets of a shard on the control channel
        if self._launcher == "torchrun":
            shards = self.wait_for_shards()
            self.wait_for(Steady(shards[2], 1), "worker that waits for its job")
            stop(shards[2])
            self.wait_for(lambda: num_sockets(shards[1].pid) == 1 + control, "connected shard")
            return shards
        # Forked shards are too quick for that. A coordinator that is stopped meanwhile hears no hello.
        driver = psutil.Process(self.process.pid)
        # It has handed out the jobs when it loads the tokenizer, and the nursery still imports torch for a while.
        maps = Path(f"/proc/{driver.pid}/maps")
        self.wait_for(lambda: "tokenizers" in maps.read_text(), "driver that loads the tokenizer")
        stop(driver)
        shards = self.wait_for_shards()
        for shard in shards[1:]:
            self.wait_for(Steady(shard, control), "connecting shard")
        stop(shards[2])
        driver.resume()
        return shards

    def _coordinator(self) -> psutil.Process:
        if self._launcher != "torchrun":
            return psutil.Process(self.process.pid)
        return next(process for process in self.left() if "kvshard.launch.torchrun" in process.cmdline())

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            ours = process.environ().get("TMPDIR") == str(self._temp)
            return ours and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def _shards(self) -> list[psutil.Process]:
        try:
            children = psutil.Process(self.process.pid).children()
            if self._launcher == "torchrun":
                workers = [p for p in children if "--report-exit-code" in p.cmdline()]
                return sorted(workers, key=lambda p: int(p.environ()["RANK"]))
            if self._launcher == "ray":
                return [
                    p for c in children for p in c.children() if "ray::ShardActor" in " ".join(p.cmdline())
                ]
            nursery = [p for p in children if "kvshard.launch.nursery" in p.cmdline()]
            return sorted((p for n in nursery for p in n.children()), key=lambda p: (p.create_time(), p.pid))
        except (psutil.Error, KeyError):
            return []

"""`kvshard run`: one batch job from its config to its summary, in this process."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape

from ..runtime.batch.inputs import find_inputs
from ..runtime.batch.job import run_batch
from ..runtime.batch.output import OutputFile
from ..runtime.batch.records import BadRow, Row, read_rows
from ..runtime.config import JobConfig
from ..runtime.coordinator.launcher import Launcher
from ..runtime.errors import ConfigError, ShardError
from ..runtime.models.fields import CheckpointError
from ..runtime.observe.progress import make_progress
from ..runtime.observe.summary import print_summary

EXIT_OK = 0
EXIT_ROWS_FAILED = 1
EXIT_JOB_ERROR = 2
EXIT_INTERRUPTED = 130

GO_ON = "The rows that finished are in the output file; the same command runs the others."


def execute_job(
    config: JobConfig,
    limit: int | None = None,
    retry_failed: bool = False,
    launcher: Launcher | None = None,
) -> int:
    """Run the rows of `config.input` that `config.output` lacks; returns the exit code of `kvshard run`.

    `limit` takes the first rows of the input only; `retry_failed` runs rows again that ended as an input
    error; `launcher` replaces the one that the config names. Errors are told on stderr.
    """
    return report_errors(lambda: _execute(config, limit, retry_failed, launcher), hint=GO_ON)


def is_done(config: JobConfig, limit: int | None = None, retry_failed: bool = False) -> bool:
    """True, and said so, when no row is left to run. Raises ConfigError for a bad input or output file."""
    with _Job(config, limit, retry_failed) as job:
        return job.is_done()


def report_errors(action: Callable[[], int], hint: str = "") -> int:
    """What `action` returns; an error that a user can mend becomes one message on stderr and an exit code.

    `hint` is added when the action was stopped in the middle.
    """
    console = Console(stderr=True)
    try:
        return action()
    except (ConfigError, CheckpointError, ShardError) as error:
        console.print(f"[bold red]Error:[/bold red] {escape(str(error))}", soft_wrap=True, highlight=False)
        if isinstance(error, ShardError) and hint:
            console.print(hint, soft_wrap=True)
        return EXIT_JOB_ERROR
    except KeyboardInterrupt:
        # Where the interrupt came out of a string of code, which dataclasses are made with when they are imported,
        # `python -m` would end by SIGINT and not with our exit code. Running another string takes that back.
        exec("")
        console.print(f"Interrupted. {hint}", soft_wrap=True)
        return EXIT_INTERRUPTED


class _Job:
    """Input and output files, opened before anything else starts."""

    def __init__(self, config: JobConfig, limit: int | None, retry_failed: bool) -> None:
        if config.input is None:
            raise ConfigError("input.path is missing: it names the file with the requests")
        if config.output is None:
            raise ConfigError("output.path is missing: it names the file for the results")
        self._files = find_inputs(config.input.path)
        self._config = config
        self._format = config.input.format
        self._limit = limit
        row_ids = None if limit is None else {row.row_id for row in self.rows()}
        self.output = OutputFile.open(Path(config.output.path), config, retry_failed, row_ids)
        # One reading of the input, so that the bar has a total and no shard starts for nothing.
        self.num_rows = self.num_left = 0
        try:
            for file in self._files:
                if file.samefile(self.output.path):
                    raise ConfigError(
                        f"input.path {config.input.path} reads {file}, which is output.path; set one of them to another file"
                    )
            for row in self.rows():
                self.num_rows += 1
                self.num_left += row.row_id not in self.output.done
        except BaseException:
            self.output.close()
            raise

    def __enter__(self) -> "_Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.output.close()

    def rows(self) -> Iterator[Row | BadRow]:
        return islice(read_rows(self._files, self._config.sampling, self._format), self._limit)

    def is_done(self) -> bool:
        """True when no row is left; how much is done is told on stdout."""
        if self.num_left:
            return False
        console = Console(highlight=False, soft_wrap=True)
        console.print(f"All {self.num_rows:,} rows are done already; nothing was started.")
        if self.output.num_failed:
            console.print(f"{self.output.num_failed:,} of them failed; --retry-failed runs them again.")
        console.print(f"Results in {escape(str(self.output.path))}")
        return True


def _execute(config: JobConfig, limit: int | None, retry_failed: bool, launcher: Launcher | None) -> int:
    status = Console(stderr=True, highlight=False)
    with _StopSignals() as signals, _Job(config, limit, retry_failed) as job:
        if job.is_done():
            return EXIT_OK
        if job.num_left < job.num_rows:
            num_done = job.num_rows - job.num_left
            status.print(f"{num_done:,} of {job.num_rows:,} rows are done already; running the others.")
        from .engine import Engine  # late: torch and transformers take seconds to import

        def on_status(text: str) -> None:
            status.print(escape(text), soft_wrap=True)

        with Engine.start(config, launcher=launcher, on_status=on_status) as engine:
            job.output.save_config(engine.config)
            progress = make_progress(status)
            progress.start(job.num_left)
            try:
                with signals.finish_the_step():
                    summary = run_batch(engine, job.rows(), job.output, progress, signals.stop)
            finally:
                progress.stop()
    print_summary(summary, Console())
    if summary.interrupted:
        status.print(f"Interrupted. {GO_ON}", soft_wrap=True)
        return EXIT_INTERRUPTED
    return EXIT_ROWS_FAILED if summary.num_failed else EXIT_OK


class _StopSignals:
    """While entered, SIGINT and SIGTERM raise KeyboardInterrupt, or first set `stop` where that is watched."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._watched = False

    def __enter__(self) -> "_StopSignals":
        self._previous = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def finish_the_step(self) -> Iterator[None]:
        """Inside, the first signal only sets `stop`; a second one does not wait for the step."""
        self._watched = True
        try:
            yield
        finally:
            self._watched = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._watched or self.stop.is_set():
            raise KeyboardInterrupt
        self.stop.set()

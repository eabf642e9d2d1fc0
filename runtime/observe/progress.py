"""How far a job is: a bar on a terminal, now and then a plain line in a log file."""

import time
from typing import IO, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_INTERVAL_S = 10.0


class ProgressView(Protocol):
    """What a job tells; `update` may be called after every step."""

    def start(self, total: int) -> None:
        """`total` rows are to be done."""

    def update(self, num_done: int, num_failed: int, num_tokens: int) -> None:
        """So many rows are done, failed ones included, and so many output tokens were made."""

    def stop(self) -> None:
        """No more updates; safe to call twice."""


class NoProgress:
    """Shows nothing."""

    def start(self, total: int) -> None:
        pass

    def update(self, num_done: int, num_failed: int, num_tokens: int) -> None:
        pass

    def stop(self) -> None:
        pass


class BarProgress:
    """A bar with rows, output tokens a second and the time left."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("Rows"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:,.1f} tokens/s{task.fields[failed]}"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._started_s = 0.0

    def start(self, total: int) -> None:
        self._started_s = time.monotonic()
        self._task = self._bar.add_task("rows", total=total, rate=0.0, failed="")
        self._bar.start()

    def update(self, num_done: int, num_failed: int, num_tokens: int) -> None:
        elapsed_s = time.monotonic() - self._started_s
        self._bar.update(
            self._task,
            completed=num_done,
            rate=num_tokens / elapsed_s if elapsed_s > 0 else 0.0,
            failed=f", [red]{num_failed} failed[/red]" if num_failed else "",
        )

    def stop(self) -> None:
        self._bar.stop()


class LineProgress:
    """A plain line every `LINE_INTERVAL_S`, and one at the end."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._total = 0
        self._counts = (0, 0, 0)
        self._started_s = self._shown_s = 0.0
        self._stopped = True

    def start(self, total: int) -> None:
        self._total = total
        self._started_s = self._shown_s = time.monotonic()
        self._stopped = False

    def update(self, num_done: int, num_failed: int, num_tokens: int) -> None:
        self._counts = (num_done, num_failed, num_tokens)
        now_s = time.monotonic()
        if now_s - self._shown_s >= LINE_INTERVAL_S:
            self._shown_s = now_s
            self._show(now_s)

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._show(time.monotonic())

    def _show(self, now_s: float) -> None:
        num_done, num_failed, num_tokens = self._counts
        elapsed_s = max(now_s - self._started_s, 1e-9)
        failed = f", {num_failed} failed" if num_failed else ""
        left = ""
        if 0 < num_done < self._total:
            left = f", about {clock((self._total - num_done) * elapsed_s / num_done)} left"
        print(
            f"{num_done}/{self._total} rows{failed}, {num_tokens / elapsed_s:,.1f} tokens/s, "
            f"{clock(elapsed_s)} passed{left}",
            file=self._stream,
            flush=True,
        )


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03 or 2:03."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"


def make_progress(console: Console) -> ProgressView:
    """A bar when `console` is a terminal, else plain lines to the same stream."""
    return BarProgress(console) if console.is_terminal else LineProgress(console.file)

"""What a batch job did, and the table that says so at its end."""

import statistics
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..coordinator.executor import ShardHealth, ShardInfo
from ..coordinator.request import Request
from ..coordinator.stats import CoordinatorStats
from .memory_plan import gib

_SAMPLE_CHARS = 400


@dataclass(frozen=True)
class ShardUse:
    """One shard at the end of a job; peaks are None when it did not answer."""

    info: ShardInfo
    peak_memory_bytes: int | None  # host: peak resident set; CUDA: peak allocated
    peak_kv_bytes: int | None  # of info.kv_bytes


@dataclass
class BatchSummary:
    """Counts of one run; rows that an earlier run finished are only `num_skipped`."""

    output_path: Path
    num_ok: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    num_prompt_tokens: int = 0  # of answered rows
    num_output_tokens: int = 0
    wall_s: float = 0.0
    interrupted: bool = False
    # Doubles in arrays: a million rows take 16 MB.
    ttft_ms: "array[float]" = field(default_factory=lambda: array("d"))
    tpot_ms: "array[float]" = field(default_factory=lambda: array("d"))
    sample: tuple[str, str] | None = None  # id and answer of the first row that was answered
    shards: list[ShardUse] = field(default_factory=list)
    scheduler: CoordinatorStats = field(default_factory=CoordinatorStats)

    def add(self, requests: Sequence[Request]) -> None:
        """Count one answered row: the samples of one prompt."""
        self.num_ok += 1
        self.num_prompt_tokens += len(requests[0].prompt_token_ids)
        for request in requests:
            self.num_output_tokens += len(request.output_token_ids)
            if request.ttft_ms is not None:
                self.ttft_ms.append(request.ttft_ms)
            if request.tpot_ms is not None:
                self.tpot_ms.append(request.tpot_ms)
            if self.sample is None and request.text.strip():
                self.sample = (request.request_id, request.text.strip())

    def add_engine(
        self, infos: Sequence[ShardInfo], health: Sequence[ShardHealth], stats: CoordinatorStats
    ) -> None:
        """Note what the scheduler did and what each shard used; the blocks used are the same on all."""
        self.scheduler = stats
        peaks = {answer.rank: answer.peak_memory_bytes for answer in health}
        self.shards = [
            ShardUse(
                info,
                peaks.get(info.rank),
                info.kv_bytes * stats.peak_used_blocks // info.num_blocks if info.num_blocks else None,
            )
            for info in infos
        ]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second."""
        return self.num_output_tokens / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def requests_per_s(self) -> float:
        return self.num_ok / self.wall_s if self.wall_s > 0 else 0.0


def median_and_p99(values: Sequence[float]) -> tuple[float, float] | None:
    """Both by linear interpolation between the two nearest values; None without values."""
    if not values:
        return None
    if len(values) == 1:
        return values[0], values[0]
    return statistics.median(values), statistics.quantiles(values, n=100, method="inclusive")[98]


def print_summary(summary: BatchSummary, console: Console) -> None:
    """The job's numbers, one line a shard, where the results are and one answer."""
    title = "Batch job interrupted" if summary.interrupted else "Batch job finished"
    job = Table(title=title, box=box.SIMPLE_HEAD, show_header=False, title_justify="left")
    job.add_column(style="cyan", no_wrap=True)
    job.add_column(overflow="fold")
    for name, value in _job_rows(summary):
        job.add_row(name, value)
    console.print(job)
    if summary.shards:
        console.print(_shard_table(summary.shards))
    if summary.sample is not None:
        row_id, text = summary.sample
        shown = text if len(text) <= _SAMPLE_CHARS else text[: _SAMPLE_CHARS - 3] + "..."
        console.print(f"[cyan]Sample answer[/cyan] ({escape(row_id)}): {escape(shown)}", highlight=False)
    # A path that is cut or wrapped cannot be copied.
    console.print(
        f"[cyan]Results in[/cyan] {escape(str(summary.output_path))}", highlight=False, soft_wrap=True
    )


def _job_rows(summary: BatchSummary) -> list[tuple[str, str]]:
    failed = f"[red]{summary.num_failed:,} failed[/red]" if summary.num_failed else "0 failed"
    skipped = f", {summary.num_skipped:,} done before" if summary.num_skipped else ""
    stats = summary.scheduler
    scheduler = f"{stats.num_chunked_prompts} chunked prompts, {stats.num_preemptions} preemptions, "
    scheduler += f"{stats.max_plans_in_flight_ahead} plans ahead"
    return [
        ("Requests", f"{summary.num_ok:,} ok, {failed}{skipped}"),
        ("Tokens", f"{summary.num_prompt_tokens:,} prompt, {summary.num_output_tokens:,} output"),
        ("Prefix cache", _found(stats)),
        ("Time to first token", _latency(summary.ttft_ms)),
        ("Time per output token", _latency(summary.tpot_ms)),
        ("Speed", f"{summary.tokens_per_s:,.1f} output tokens/s, {summary.requests_per_s:,.2f} requests/s"),
        ("Wall time", f"{summary.wall_s:,.1f} s"),
        ("Steps", f"{stats.num_steps} steps, {stats.num_token_steps} token steps"),
        ("Scheduler", scheduler),
    ]


def _found(stats: CoordinatorStats) -> str:
    """How much of the prompts was there already; "-" where nothing was looked up."""
    found, looked_up = stats.num_cached_prompt_tokens, stats.num_looked_up_prompt_tokens
    return f"{found:,} of {looked_up:,} prompt tokens ({found / looked_up:.1%})" if looked_up else "-"


def _latency(values: Sequence[float]) -> str:
    both = median_and_p99(values)
    return "-" if both is None else f"{both[0]:,.1f} ms median, {both[1]:,.1f} ms p99"


def _shard_table(shards: list[ShardUse]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("Shard", justify="right")
    table.add_column("Host", overflow="ellipsis", no_wrap=True, max_width=12)
    table.add_column("Device", no_wrap=True)
    for name in ("Heads", "Weights", "Peak memory", "KV cache used"):
        table.add_column(name, justify="right", no_wrap=name != "Peak memory")
    for use in shards:
        info = use.info
        table.add_row(
            str(info.rank),
            escape(info.host),
            escape(info.device),
            f"{info.num_q_heads}q {info.num_kv_heads}kv",
            gib(info.weight_bytes),
            "-" if use.peak_memory_bytes is None else gib(use.peak_memory_bytes),
            "-" if use.peak_kv_bytes is None else _share(use.peak_kv_bytes, info.kv_bytes),
        )
    return table


def _share(used_bytes: int, whole_bytes: int) -> str:
    """As "1.50/2.00 GiB", or "800.0 MiB/2.00 GiB" when the units differ."""
    used, whole = gib(used_bytes), gib(whole_bytes)
    if used[-3:] == whole[-3:]:
        used = used[:-4]
    return f"{used}/{whole}"

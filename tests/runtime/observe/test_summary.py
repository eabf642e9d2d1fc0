"""The numbers at the end of a job, and how they and the progress are shown."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from kvshard.runtime.coordinator.executor import ShardHealth, ShardInfo
from kvshard.runtime.coordinator.request import Request
from kvshard.runtime.coordinator.stats import CoordinatorStats
from kvshard.runtime.observe import progress as progress_module
from kvshard.runtime.observe.progress import BarProgress, LineProgress, clock, make_progress
from kvshard.runtime.observe.summary import BatchSummary, median_and_p99, print_summary
from kvshard.runtime.sampling_params import SamplingParams


def finished(request_id: str, num_tokens: int, text: str, first_s: float, per_token_s: float) -> Request:
    request = Request.new(request_id, [1, 2, 3], SamplingParams())
    request.output_token_ids = list(range(num_tokens))
    request.text = text
    request.arrived_s, request.admitted_s = 1.0, 10.0
    request.first_token_s = 10.0 + first_s
    request.finished_s = request.first_token_s + per_token_s * (num_tokens - 1)
    return request


def make_summary() -> BatchSummary:
    summary = BatchSummary(Path("/data/" + "long/" * 20 + "out.jsonl"), num_failed=2, num_skipped=5)
    summary.add([finished("a", 5, "  ", 0.1, 0.02)])
    summary.add([finished("b", 1, "An [red]answer[/red].\nTwo lines.", 0.3, 0.0)])
    summary.wall_s = 2.0
    info = ShardInfo(
        0, "a-host-with-a-long-name.example.org", 7, "cuda:0", 32, 8, 2**34, 2**35, 1000, "nccl", 4
    )
    stats = CoordinatorStats(
        peak_used_blocks=500, num_cached_prompt_tokens=1500, num_looked_up_prompt_tokens=4000
    )
    summary.add_engine([info], [ShardHealth(0, 5, 2**34 + 2**33)], stats)
    return summary


def test_times_and_rates() -> None:
    summary = make_summary()
    assert list(summary.ttft_ms) == pytest.approx([100, 300])
    assert list(summary.tpot_ms) == pytest.approx([20])  # one token has no time per token
    assert (summary.num_ok, summary.num_prompt_tokens, summary.num_output_tokens) == (2, 6, 6)
    assert (summary.tokens_per_s, summary.requests_per_s) == (3.0, 1.0)
    assert summary.sample is not None
    assert summary.sample[0] == "b"  # the first that says anything


def test_median_and_p99() -> None:
    assert median_and_p99([]) is None
    assert median_and_p99([5.0]) == (5.0, 5.0)
    assert median_and_p99([float(value) for value in range(101)]) == pytest.approx((50, 99))


def test_the_table_fits_80_columns_without_a_terminal() -> None:
    stream = io.StringIO()
    summary = make_summary()
    print_summary(summary, Console(file=stream, width=80))
    text = stream.getvalue()
    assert "\x1b" not in text
    path = str(summary.output_path)
    assert f"Results in {path}\n" in text  # in one piece
    assert all(len(line) <= 80 for line in text.replace(path, "").splitlines())
    for words in (
        "2 ok, 2 failed, 5 done before",
        "6 prompt, 6 output",
        "1,500 of 4,000 prompt tokens (37.5%)",
        "200.0 ms median, 298.0 ms p99",
        "3.0 output tokens/s, 1.00 requests/s",
        "32q 8kv",
        "16.00/32.00 GiB",
        "24.00 GiB",
        "An [red]answer[/red].",
    ):
        assert words in text, text


def test_an_empty_summary_can_be_shown() -> None:
    stream = io.StringIO()
    print_summary(BatchSummary(Path("out.jsonl"), interrupted=True), Console(file=stream, width=80))
    assert "interrupted" in stream.getvalue()
    [line] = [line for line in stream.getvalue().splitlines() if "Prefix cache" in line]
    assert line.split() == ["Prefix", "cache", "-"]


def test_lines_for_a_log_file(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now_s)
    stream = io.StringIO()
    view = make_progress(Console(file=stream))
    assert isinstance(view, LineProgress)
    view.start(200)
    for step in range(1, 251):
        now_s = step * 0.1
        view.update(step // 5, step // 50, step * 10)
    now_s = 25.0
    view.stop()
    view.stop()
    assert stream.getvalue().splitlines() == [
        "20/200 rows, 2 failed, 100.0 tokens/s, 0:10 passed, about 1:30 left",
        "40/200 rows, 4 failed, 100.0 tokens/s, 0:20 passed, about 1:20 left",
        "50/200 rows, 5 failed, 100.0 tokens/s, 0:25 passed, about 1:15 left",
    ]


def test_a_bar_for_a_terminal() -> None:
    stream = io.StringIO()
    view = make_progress(Console(file=stream, force_terminal=True, width=80))
    assert isinstance(view, BarProgress)
    view.start(4)
    view.update(3, 1, 100)
    view.stop()
    view.stop()
    assert "3/4" in stream.getvalue()
    assert "1 failed" in stream.getvalue()


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 3723)] == ["0:00", "1:00", "1:02:03"]

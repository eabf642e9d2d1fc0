"""Ctrl-C and SIGTERM: exit code 130, whole lines in the output, and the same command goes on."""

import json
import signal
from pathlib import Path

import pytest
from running_job import NUM_ROWS, RunningJob, complete, write_long_job

SIZE = 3
STOP_S = 40.0  # the step, then the shards' end; torchrun's agent looks at its workers now and then


@pytest.mark.parametrize(
    ("launcher", "size", "number"),
    [
        ("local", SIZE, signal.SIGINT),
        pytest.param("local", SIZE, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("local", 1, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("ray", SIZE, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("ray", SIZE, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("torchrun", SIZE, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("torchrun", SIZE, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_job_goes_on(
    launcher: str, size: int, number: signal.Signals, tiny_model: Path, temp: Path, tmp_path: Path
) -> None:
    job = write_long_job(tmp_path, tiny_model, launcher, size)
    with RunningJob(job, launcher, size, temp) as run:
        run.wait_for_rows()
        run.interrupt(number)
        assert run.wait(STOP_S) == 130, run.log()
        run.assert_nothing_left()
        assert "the same command" in run.log().lower(), run.log()
        assert "Traceback" not in run.log()
    lines = (tmp_path / "output.jsonl").read_text().splitlines(keepends=True)
    assert all(line.endswith("\n") and json.loads(line)["response"] for line in lines)
    assert 8 <= len(lines) < NUM_ROWS
    log = complete(job, launcher, size, temp)
    assert f"{len(lines)} of {NUM_ROWS} rows are done already" in log


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "ray", "torchrun"])
def test_an_interrupt_during_the_start_is_quick(
    launcher: str, tiny_model: Path, temp: Path, tmp_path: Path
) -> None:
    job = write_long_job(tmp_path, tiny_model, launcher, SIZE)
    with RunningJob(job, launcher, SIZE, temp) as run:
        run.wait_for_shards()
        run.interrupt(signal.SIGINT)
        assert run.wait(STOP_S) == 130, run.log()
        run.assert_nothing_left()
        assert "Traceback" not in run.log()

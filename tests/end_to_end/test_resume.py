"""The same command again: what is done stays, what is not runs, and nothing runs twice."""

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
from jobs import run_job, write_job
from running_job import make_tiny_model

ROWS: list[dict[str, Any]] = [{"id": f"row{i}", "prompt": f"w{3 + i} w5", "max_tokens": 6} for i in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def config(model: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "device": "cpu",
        "threads_per_shard": 1,
        "cache": {"num_blocks": 32},
        "sampling": {"ignore_eos": True},
    }


def tokens(output: Path) -> dict[str, list[int]]:
    """Token ids by row; the ids must stand there once."""
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    found = {line["custom_id"]: line["response"]["body"]["choices"][0]["token_ids"] for line in lines}
    assert len(found) == len(lines), "an id was written twice"
    return found


def test_a_torn_output_is_completed_by_another_number_of_shards(
    config: dict[str, Any], tmp_path: Path
) -> None:
    job, output = write_job(tmp_path, config, ROWS), tmp_path / "output.jsonl"
    assert run_job(job).returncode == 0
    first = tokens(output)
    assert sorted(first) == sorted(row["id"] for row in ROWS)

    lines = output.read_bytes().splitlines(keepends=True)
    kept = [json.loads(line)["custom_id"] for line in lines[2:5]]
    output.write_bytes(b"".join(lines[2:5]) + lines[5][:100])  # three rows, and a half
    again = run_job(job, "--set", "tensor_parallel_size=2")
    assert again.returncode == 0, again.stderr
    assert "3 of 8 rows are done already" in again.stderr
    assert "5 ok, 0 failed, 3 done before" in again.stdout
    assert tokens(output) == first
    assert output.read_bytes().startswith(b"".join(lines[2:5])), f"the lines of {kept} were touched"

    before = output.read_bytes()
    third = run_job(job)
    assert third.returncode == 0, third.stderr
    assert "All 8 rows are done already; nothing was started" in third.stdout
    assert output.read_bytes() == before


@pytest.mark.slow
def test_other_settings_that_change_answers_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    job = write_job(tmp_path, config, ROWS)
    assert run_job(job, "--limit", "2").rows.keys() == {"row0", "row1"}
    before = (tmp_path / "output.jsonl").read_bytes()
    other = run_job(job, "--set", "sampling.temperature=0.5")
    assert other.returncode == 2
    for word in ("sampling.temperature", "output.path", "made with"):
        assert word in other.stderr
    assert (tmp_path / "output.jsonl").read_bytes() == before


def test_two_runs_at_once_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    job, output = write_job(tmp_path, config, ROWS), tmp_path / "output.jsonl"
    with output.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = run_job(job)
    assert second.returncode == 2
    assert f"another run is writing {output}" in second.stderr


@pytest.mark.slow
def test_failed_rows_run_again_when_asked(config: dict[str, Any], tmp_path: Path) -> None:
    bad = {"id": "bad", "prompt": "w5", "max_tokens": -1}
    job = write_job(tmp_path, config, [*ROWS[:2], bad])
    first = run_job(job)
    assert (first.returncode, first.rows["bad"]["error"]["type"]) == (1, "input_error")
    write_job(tmp_path, config, [*ROWS[:2], bad | {"max_tokens": 6}])
    assert "--retry-failed" in run_job(job).stdout
    mended = run_job(job, "--retry-failed")
    assert mended.returncode == 0, mended.stderr
    assert mended.rows["bad"]["error"] is None
    assert len(mended.rows) == 3

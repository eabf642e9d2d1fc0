"""torchrun: started by kvshard, and joined by it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import environment, read_output, run_job, write_job
from running_job import make_tiny_model

ROWS: list[dict[str, Any]] = [{"id": f"row{i}", "prompt": f"w{3 + i} w5", "max_tokens": 6} for i in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def config_for(model: Path, size: int) -> dict[str, Any]:
    return {
        "model": str(model),
        "launcher": "torchrun",
        "device": "cpu",
        "tensor_parallel_size": size,
        "cache": {"num_blocks": 32},
    }


def torchrun(job: Path, num_workers: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(num_workers),
    ]
    command += ["-m", "kvshard", "run", str(job), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=environment(), check=False
    )


def test_the_exit_code_is_the_jobs_and_torchrun_says_nothing(model: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {"id": "bad", "prompt": "w5", "max_tokens": -1}]
    done = run_job(write_job(tmp_path, config_for(model, 2), rows))
    assert done.returncode == 1, done.stderr
    assert done.rows.keys() == {row["id"] for row in rows}
    assert done.rows["bad"]["error"]["type"] == "input_error"
    assert done.stdout.count("Batch job finished") == 1
    for word in ("Traceback", "torch/distributed", "OMP_NUM_THREADS"):
        assert word not in done.stderr


@pytest.mark.slow
def test_a_job_error_is_told_once(model: Path, tmp_path: Path) -> None:
    """Six heads, two shards: the coordinator finds that two blocks are too few, and the workers are sent home."""
    config = config_for(model, 2) | {"cache": {"num_blocks": 2}, "scheduler": {"max_model_len": 400}}
    done = run_job(write_job(tmp_path, config, ROWS))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("Error:") == 1, done.stderr
    assert "cache.num_blocks" in done.stderr


@pytest.mark.slow
def test_a_job_that_is_done_starts_no_torchrun(model: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, config_for(model, 1) | {"launcher": "local"}, ROWS[:1])
    assert run_job(job).returncode == 0
    again = run_job(job, "--set", "launcher=torchrun", "--set", "tensor_parallel_size=6", timeout_s=60)
    assert again.returncode == 0, again.stderr
    assert "nothing was started" in again.stdout


@pytest.mark.slow
def test_joining_a_torchrun_of_the_users(model: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, config_for(model, 3), ROWS)
    done = torchrun(job, 3)
    assert done.returncode == 0, done.stderr
    assert read_output(tmp_path / "output.jsonl").keys() == {row["id"] for row in ROWS}


@pytest.mark.slow
def test_another_number_of_workers_is_refused(model: Path, tmp_path: Path) -> None:
    done = torchrun(write_job(tmp_path, config_for(model, 3), ROWS), 2)
    assert done.returncode != 0
    assert "tensor_parallel_size=3 and torchrun started 2 workers" in done.stderr
    assert "--nproc-per-node" in done.stderr

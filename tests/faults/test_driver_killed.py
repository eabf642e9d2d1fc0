"""SIGKILL of the process that the user started: nothing is left, and the same command completes the job."""

from pathlib import Path

import pytest
from running_job import RunningJob, complete, write_long_job

LAUNCHERS = [
    "local",
    pytest.param("ray", marks=pytest.mark.slow),
    pytest.param("torchrun", marks=pytest.mark.slow),
]
SIZE = 3


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_in_the_middle_of_decoding(
    launcher: str, tiny_model: Path, temp: Path, tmp_path: Path
) -> None:
    job = write_long_job(tmp_path, tiny_model, launcher, SIZE)
    with RunningJob(job, launcher, SIZE, temp) as run:
        run.wait_for_rows()
        run.kill()
        run.assert_nothing_left()
        before = run.num_lines()
    complete(job, launcher, SIZE, temp)
    assert before >= 8


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "ray", "torchrun"])
def test_killed_while_the_shards_import_and_load(
    launcher: str, tiny_model: Path, temp: Path, tmp_path: Path
) -> None:
    job = write_long_job(tmp_path, tiny_model, launcher, SIZE)
    with RunningJob(job, launcher, SIZE, temp) as run:
        run.wait_for_shards()
        run.kill()
        run.assert_nothing_left()
    complete(job, launcher, SIZE, temp)


@pytest.mark.slow
def test_killed_before_there_is_a_shard(tiny_model: Path, temp: Path, tmp_path: Path) -> None:
    """The nursery finds its parent gone when it has imported what it needs."""
    job = write_long_job(tmp_path, tiny_model, "local", SIZE)
    with RunningJob(job, "local", SIZE, temp) as run:
        run.wait_for(lambda: len(run.left()) > 1, "nursery")
        run.kill()
        run.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_killed_between_creating_and_attaching_the_segment(
    launcher: str, tiny_model: Path, temp: Path, tmp_path: Path
) -> None:
    """One shard is stopped there, so it cannot do anything for its own end."""
    job = write_long_job(tmp_path, tiny_model, launcher, SIZE)
    with RunningJob(job, launcher, SIZE, temp) as run:
        segment = run.stop_before_attaching()
        assert run.num_lines() == 0
        run.kill()
        run.assert_nothing_left(segment)
    complete(job, launcher, SIZE, temp)

"""One shard of a running job dies or hangs: the error names it, and the same command completes the job."""

import re
from pathlib import Path

import pytest
from other_processes import stop
from running_job import RunningJob, complete, write_long_job

SIZE = 3
TOLD_S = 20.0  # until a death is reported; some seconds when the machine is not busy


@pytest.mark.parametrize(
    ("launcher", "victim"),
    [
        ("local", 2),
        pytest.param("local", 0, marks=pytest.mark.slow),
        pytest.param("ray", 1, marks=pytest.mark.slow),
        pytest.param("torchrun", 1, marks=pytest.mark.slow),
        pytest.param("torchrun", 0, marks=pytest.mark.slow),
    ],
)
def test_a_killed_shard_is_named(
    launcher: str, victim: int, tiny_model: Path, temp: Path, tmp_path: Path
) -> None:
    job = write_long_job(tmp_path, tiny_model, launcher, SIZE)
    with RunningJob(job, launcher, SIZE, temp) as run:
        shards = run.wait_for_shards()
        run.wait_for_rows()
        shards[victim].kill()
        assert run.wait(TOLD_S) == 2, run.log()
        run.assert_nothing_left()
        log = run.log()
    if launcher == "local":
        assert f"shard {victim} on " in log
        assert "killed by SIGKILL" in log
    elif launcher == "ray":
        assert re.search(r"shard \d on .* its Ray actor died", log, re.DOTALL)
    else:  # told by the coordinator, or by the process that is torchrun's agent, whichever is there
        assert re.search(rf"shard {victim} (on|was lost)", log)
    assert "Traceback" not in log
    assert "the same command" in log.lower()
    complete(job, launcher, SIZE, temp)


@pytest.mark.slow
def test_a_killed_coordinator_of_torchrun_ends_its_workers(
    tiny_model: Path, temp: Path, tmp_path: Path
) -> None:
    job = write_long_job(tmp_path, tiny_model, "torchrun", SIZE)
    with RunningJob(job, "torchrun", SIZE, temp) as run:
        run.wait_for_rows()
        (coordinator,) = [p for p in run.left() if "kvshard.launch.torchrun" in p.cmdline()]
        coordinator.kill()
        assert run.wait(TOLD_S) == 2, run.log()
        run.assert_nothing_left()
        assert "the same command" in run.log().lower()
    complete(job, "torchrun", SIZE, temp)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_a_hanging_shard_is_named_in_time(
    launcher: str, tiny_model: Path, temp: Path, tmp_path: Path
) -> None:
    timeouts = {"step_s": 3.0, "close_s": 2.0}
    job = write_long_job(tmp_path, tiny_model, launcher, SIZE, timeouts=timeouts)
    with RunningJob(job, launcher, SIZE, temp) as run:
        hanging = run.wait_for_shards()[1]
        run.wait_for_rows()
        stop(hanging)
        run.wait_for(lambda: "shard 1 on " in run.log() or run.process.poll() is not None, "error", TOLD_S)
        if launcher == "torchrun":
            hanging.resume()  # torchrun itself waits 30 s for its workers before it kills them
        assert run.wait(TOLD_S) == 2, run.log()
        assert "shard 1 on " in run.log()
        run.assert_nothing_left()

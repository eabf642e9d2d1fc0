"""`kvshard run`, with a fake engine in this process."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from kvshard.launch.cli import app
from kvshard.runtime.errors import ConfigError
from kvshard.runtime.models.fields import CheckpointError

from ..runtime.batch.fakes import FakeEngine, fake_engine_module


@pytest.fixture(autouse=True)
def _fake_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "kvshard.launch.engine", fake_engine_module())
    monkeypatch.delenv("RANK", raising=False)
    yield
    assert all(engine.executor.closed for engine in FakeEngine.started)


class Job:
    """A job file with its input in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "job.yaml"
        self.input = folder / "rows.jsonl"
        self.output = folder / "results" / "out.jsonl"
        self.settings: dict[str, Any] = {
            "model": "some/model",
            "sampling": {"max_tokens": 3, "temperature": 0},
            "input": {"path": "rows.jsonl"},
            "output": {"path": "results/out.jsonl"},
        }
        self.rows(5)

    def rows(self, count: int, *more: str) -> None:
        lines = [json.dumps({"id": f"r{number}", "prompt": "x"}) for number in range(count)]
        self.input.write_text("".join(line + "\n" for line in [*lines, *more]))

    def run(self, *options: str) -> Result:
        self.path.write_text(yaml.safe_dump(self.settings))
        return CliRunner().invoke(app, ["run", str(self.path), *options])

    def ids(self) -> list[str]:
        return [json.loads(line)["custom_id"] for line in self.output.read_bytes().splitlines()]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def one_message(result: Result) -> str:
    """The error's text; it must be all there is on stderr."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("Error: ")
    assert not FakeEngine.started
    return result.stderr


def test_a_job_from_start_to_end(job: Job) -> None:
    result = job.run()
    assert result.exit_code == 0, result.output
    assert sorted(job.ids()) == ["r0", "r1", "r2", "r3", "r4"]
    assert "5 ok, 0 failed" in result.stdout
    assert f"Results in {job.output}" in result.stdout.replace("\n", "")
    assert "5/5 rows" in result.stderr
    saved = yaml.safe_load(Path(f"{job.output}.config.yaml").read_text())
    assert (saved["model"], saved["dtype"], saved["input"]["path"]) == (
        "some/model",
        "float32",
        str(job.input),
    )


def test_the_same_command_again_starts_nothing(job: Job) -> None:
    job.run()
    before = job.output.read_bytes()
    result = job.run()
    assert result.exit_code == 0
    assert "All 5 rows are done already; nothing was started." in result.stdout
    assert str(job.output) in result.stdout.replace("\n", "")
    assert len(FakeEngine.started) == 1
    assert job.output.read_bytes() == before


def test_limit_takes_the_first_rows_and_the_rest_comes_later(job: Job) -> None:
    assert job.run("--limit", "2").exit_code == 0
    assert sorted(job.ids()) == ["r0", "r1"]
    result = job.run()
    assert "2 of 5 rows are done already" in result.stderr
    assert "3 ok, 0 failed, 2 done before" in result.stdout
    assert sorted(job.ids()) == ["r0", "r1", "r2", "r3", "r4"]


def test_failed_rows_beyond_the_limit_are_left(job: Job) -> None:
    job.rows(2, "{broken")
    assert job.run().exit_code == 1
    result = job.run("--limit", "2", "--retry-failed")
    assert "All 2 rows are done already; nothing was started." in result.stdout
    assert "of them failed" not in result.stdout
    assert sorted(job.ids()) == ["line-3", "r0", "r1"]


def test_failed_rows_give_exit_code_1_and_are_final_until_asked(job: Job) -> None:
    job.rows(2, "{broken", '{"id": "r0", "prompt": "x"}', '{"id": "long", "prompt": "' + "x" * 500 + '"}')
    result = job.run()
    assert result.exit_code == 1
    assert "2 ok, 3 failed" in result.stdout
    assert sorted(job.ids()) == ["line-3", "line-4", "long", "r0", "r1"]

    result = job.run()
    assert result.exit_code == 0
    assert "3 of them failed; --retry-failed runs them again." in result.stdout

    job.rows(3, '{"id": "r3", "prompt": "x"}', '{"id": "long", "prompt": "short"}')
    result = job.run("--retry-failed")
    assert result.exit_code == 0, result.output
    assert sorted(job.ids()) == ["long", "r0", "r1", "r2", "r3"]


def test_settings_given_with_set(job: Job) -> None:
    other = job.path.parent / "other.jsonl"
    result = job.run("--set", "sampling.max_tokens=1", "--set", f"output.path={other}")
    assert result.exit_code == 0
    body = json.loads(other.read_text().splitlines()[0])["response"]["body"]
    assert body["choices"][0]["text"] == "A"


def test_a_relative_job_path_is_the_same_job(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    template = job.path.parent / "chat.jinja"
    template.write_text("{{ messages }}")
    job.settings["chat_template"] = "chat.jinja"
    job.run("--limit", "1")
    monkeypatch.chdir(job.path.parent)
    assert CliRunner().invoke(app, ["run", job.path.name]).exit_code == 0


def test_other_answers_do_not_go_into_the_same_file(job: Job) -> None:
    job.run("--limit", "1")
    FakeEngine.started.clear()
    message = one_message(job.run("--set", "sampling.temperature=0.7"))
    assert "sampling.temperature" in message
    assert "0.0" in message
    assert "0.7" in message
    assert "another output.path" in message
    assert job.run("--set", "tensor_parallel_size=2", "--set", "scheduler.max_num_seqs=1").exit_code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "shceduler.run_ahead=0"], ["unknown key shceduler"]),
        (["--set", "scheduler.run_ahaed=0"], ["scheduler.run_ahaed", "did you mean scheduler.run_ahead?"]),
        (["--set", "tensor_parallel_size=two"], ["tensor_parallel_size='two'", "valid integer"]),
        (["--set", "no_equals"], ["--set no_equals: write key.sub=value"]),
        (["--set", "input.path=nothing.jsonl"], ["nothing.jsonl does not exist"]),
        (["--set", "input.path=none*.jsonl"], ["matches no file"]),
        (["--set", "input.path=/dev/null"], ["/dev/null"]),
        (["--set", "output.path=/proc/out.jsonl"], ["output.path=/proc/out.jsonl"]),
        (["--set", "output.path=rows.jsonl"], ["rows.jsonl line 1 is no output line"]),
        (["--set", "input=null"], ["input.path is missing"]),
        (["--set", "output=null"], ["output.path is missing"]),
    ],
)
def test_a_bad_job_is_one_message_and_nothing_starts(job: Job, options: list[str], words: list[str]) -> None:
    before = job.input.read_bytes()
    message = one_message(job.run(*options))
    assert all(word in message for word in words), message
    assert job.input.read_bytes() == before


def test_an_input_that_takes_in_the_output_is_refused(job: Job) -> None:
    """Its lines are rows to nobody; and a file that is read while it is written has no end."""
    assert job.run("--limit", "1").exit_code == 0
    FakeEngine.started.clear()
    output = job.output.read_bytes()
    message = one_message(job.run("--set", "input.path=results/*.jsonl"))
    assert f"reads {job.output}, which is output.path" in message
    assert job.output.read_bytes() == output


def test_a_missing_or_empty_file_is_a_job_error(job: Job) -> None:
    missing = CliRunner().invoke(app, ["run", "nowhere.yaml"])
    assert "nowhere.yaml" in one_message(missing)
    job.input.write_text("\n")
    assert "is empty" in one_message(job.run())


@pytest.mark.parametrize(
    "error", [ConfigError("does not [fit]; lower x"), CheckpointError("truncated [file]")]
)
def test_a_model_that_cannot_start_is_one_message(
    job: Job, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(FakeEngine, "start", fail)
    assert one_message(job.run()) == f"Error: {error}\n"
    assert job.ids() == []


def test_a_lost_shard_is_told_and_the_same_command_goes_on(job: Job) -> None:
    job.rows(30)
    job.settings["scheduler"] = {"max_num_seqs": 2}
    FakeEngine.prepare = staticmethod(lambda engine: setattr(engine.executor, "lost_at_step", 9))
    result = job.run()
    assert result.exit_code == 2
    assert "Error: shard 1 on node-b failed at step 9: killed by signal 9" in result.stderr
    assert "the same command runs the others" in result.stderr
    assert 0 < len(job.ids()) < 30
    FakeEngine.prepare = staticmethod(lambda engine: None)
    assert job.run().exit_code == 0
    assert sorted(job.ids()) == sorted(f"r{number}" for number in range(30))


def test_ctrl_c_while_shards_start(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), 2)

    monkeypatch.setattr(FakeEngine, "start", interrupt)
    result = job.run()
    assert result.exit_code == 130
    assert result.stderr.startswith("Interrupted.")


def test_a_second_ctrl_c_does_not_wait_for_the_step(job: Job) -> None:
    def interrupt_twice() -> None:
        os.kill(os.getpid(), 2)
        os.kill(os.getpid(), 2)
        raise AssertionError("the step went on")

    FakeEngine.prepare = staticmethod(lambda engine: setattr(engine.executor, "on_step", interrupt_twice))
    assert job.run().exit_code == 130
    FakeEngine.prepare = staticmethod(lambda engine: None)
    assert job.run().exit_code == 0


def test_torchrun_is_started_with_the_same_command(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    started, joined = [], []
    fake = SimpleNamespace(
        inside_torchrun=lambda: "RANK" in os.environ,
        start_torchrun=lambda config, arguments: started.append(arguments) or 1,
        join_torchrun=lambda config, options, report: joined.append((options, report)) or 0,
    )
    monkeypatch.setitem(sys.modules, "kvshard.launch.torchrun", fake)
    job.settings["launcher"] = "torchrun"
    assert job.run("--limit", "2", "--set", "seed=3", "--retry-failed").exit_code == 1
    assert started == [[str(job.path), "--set", "seed=3", "--limit", "2", "--retry-failed"]]
    monkeypatch.setenv("RANK", "0")
    assert job.run("--limit", "2", "--report-exit-code", "code").exit_code == 0
    assert joined == [({"limit": 2, "retry_failed": False}, Path("code"))]


def test_under_torchrun_a_job_joins_unless_it_names_ray(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    joined: list[str] = []
    fake = SimpleNamespace(
        inside_torchrun=lambda: True,
        start_torchrun=None,
        join_torchrun=lambda config, options, report: joined.append(config.launcher) or 0,
    )
    monkeypatch.setitem(sys.modules, "kvshard.launch.torchrun", fake)
    assert job.run().exit_code == 0
    assert joined == ["torchrun"]
    assert "launcher=ray, but torchrun started this process" in one_message(job.run("--set", "launcher=ray"))

"""The output file as a journal: what counts as done, what is repaired, what is refused."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvshard.runtime.batch.output import OutputFile
from kvshard.runtime.batch.response import error_line
from kvshard.runtime.config import JobConfig, load_config, parse_config
from kvshard.runtime.errors import ConfigError

CONFIG = parse_config({"model": "m"}, "test")


def ok_line(row_id: str) -> bytes:
    line = {"id": "batch_req_1", "custom_id": row_id, "response": {"status_code": 200}, "error": None}
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


INPUT_ERROR = error_line("bad", "input_error", "invalid_line", "no prompt")
SYSTEM_ERROR = error_line("lost", "system_error", "request_failed", "lost")


def config(**values: Any) -> JobConfig:
    return parse_config({"model": "m", **values}, "test")


def ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()]


def test_lines_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "out.jsonl"
    with OutputFile.open(path, CONFIG) as output:
        assert output.done == set()
        output.write(ok_line("a"))
        assert path.read_bytes() == ok_line("a")
        output.write(ok_line("b"))
    assert path.read_bytes() == ok_line("a") + ok_line("b")
    with OutputFile.open(path, CONFIG) as output:
        assert output.done == {"a", "b"}
        output.write(ok_line("c"))
    assert ids(path) == ["a", "b", "c"]


def test_each_row_is_one_write_and_the_end_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real_write, real_fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda fd, data: calls.append("write") or real_write(fd, data))  # type: ignore[func-returns-value]
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or real_fsync(fd))  # type: ignore[func-returns-value]
    with OutputFile.open(tmp_path / "out.jsonl", CONFIG) as output:
        output.write(ok_line("a" * 100_000))
        output.write(ok_line("b"))
    assert [call for call in calls if call == "write"] == ["write", "write"]
    assert calls[-1] == "fsync"


def test_it_is_synced_while_it_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = threading.Event()
    monkeypatch.setattr("kvshard.runtime.batch.output.SYNC_INTERVAL_S", 0.01)
    monkeypatch.setattr(os, "fsync", lambda fd: synced.set())
    with OutputFile.open(tmp_path / "out.jsonl", CONFIG) as output:
        assert not synced.wait(0.1)  # nothing to sync
        output.write(ok_line("a"))
        assert synced.wait(10)


@pytest.mark.parametrize("by_syncer", [True, False])
def test_a_failed_sync_is_told_even_if_no_row_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_syncer: bool
) -> None:
    """As Linux does it: a write-back that failed is told by one fsync, the next one succeeds."""
    told = threading.Event()

    def fsync(fd: int) -> None:
        if not told.is_set():
            told.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("kvshard.runtime.batch.output.SYNC_INTERVAL_S", 0.01 if by_syncer else 100)
    monkeypatch.setattr(os, "fsync", fsync)
    output = OutputFile.open(tmp_path / "out.jsonl", CONFIG)
    output.write(ok_line("a"))
    assert told.wait(10) if by_syncer else not told.is_set()
    with pytest.raises(ConfigError, match=r"cannot sync .*out\.jsonl to its disk: Input/output error"):
        output.close()
    output.close()


@pytest.mark.parametrize("length", [1, 12, 30, len(ok_line("torn")) - 1])
@pytest.mark.parametrize("zeros", [0, 3])
def test_a_torn_last_line_is_taken_off(tmp_path: Path, length: int, zeros: int) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(ok_line("a") + ok_line("torn")[:length] + b"\0" * zeros)
    with OutputFile.open(path, CONFIG) as output:
        assert output.done == {"a"}
        output.write(ok_line("torn"))
    assert ids(path) == ["a", "torn"]


@pytest.mark.parametrize(
    "line", [b"{half\n", b"\n", b"[1]\n", b'{"custom_id": "x"}\n', b'{"id": "x", "prompt": "input row"}\n']
)
def test_a_bad_line_in_the_middle_is_refused_and_left(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "out.jsonl"
    content = ok_line("a") + line + ok_line("b")
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"out\.jsonl line 2 is no output line"):
        OutputFile.open(path, CONFIG)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"model: demo", b'{"id": "a", "prompt": "no newline"}'])
def test_a_file_of_somebody_else_is_not_truncated(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "precious.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="was not written by a batch job"):
        OutputFile.open(path, CONFIG)
    assert path.read_bytes() == content


def test_system_errors_run_again_and_input_errors_are_final(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(ok_line("a") + SYSTEM_ERROR + INPUT_ERROR + ok_line("b"))
    with OutputFile.open(path, CONFIG) as output:
        assert output.done == {"a", "bad", "b"}
        assert output.num_failed == 1
        assert ids(path) == ["a", "bad", "b"]
        output.write(ok_line("lost"))
    assert ids(path) == ["a", "bad", "b", "lost"]
    with OutputFile.open(path, CONFIG, retry_failed=True) as output:
        assert output.done == {"a", "b", "lost"}
        with pytest.raises(ConfigError, match="another run is writing"):  # the new file is locked too
            OutputFile.open(path, CONFIG)
        output.write(ok_line("bad"))
    assert ids(path) == ["a", "b", "lost", "bad"]
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_failed_rows_that_are_not_asked_for_keep_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    content = SYSTEM_ERROR + ok_line("a") + INPUT_ERROR
    path.write_bytes(content)
    with OutputFile.open(path, CONFIG, retry_failed=True, row_ids={"a"}) as output:
        assert output.done == {"a"}
        assert output.num_failed == 0
    assert path.read_bytes() == content
    with OutputFile.open(path, CONFIG, row_ids={"a", "bad"}) as output:
        assert output.num_failed == 1
    with OutputFile.open(path, CONFIG, row_ids={"lost"}) as output:
        assert output.done == {"a", "bad"}
        assert output.num_failed == 0
    assert ids(path) == ["a", "bad"]


def test_dropping_lines_keeps_the_files_mode(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(ok_line("a") + SYSTEM_ERROR)
    path.chmod(0o660)
    OutputFile.open(path, CONFIG).close()
    assert ids(path) == ["a"]
    assert path.stat().st_mode & 0o777 == 0o660


def test_a_link_stays_one_when_lines_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    file, link = tmp_path / "big" / "out.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(ok_line("a") + SYSTEM_ERROR)
    link.symlink_to(file)
    with OutputFile.open(link, CONFIG) as output:
        output.write(ok_line("b"))
    assert link.is_symlink()
    assert ids(file) == ["a", "b"]


def test_two_runs_cannot_write_one_output(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    script = (
        "import sys, pathlib\n"
        "from kvshard.runtime.batch.output import OutputFile\n"
        "from kvshard.runtime.config import parse_config\n"
        "OutputFile.open(pathlib.Path(sys.argv[1]), parse_config({'model': 'm'}, 'test'))\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=r"another run is writing .*out\.jsonl"):
            OutputFile.open(path, CONFIG)
        other.kill()
        other.wait(10)
    OutputFile.open(path, CONFIG).close()  # a killed run leaves no lock


def test_what_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path, file / "out.jsonl", Path("/proc/out.jsonl"), Path("/dev/null")):
        with pytest.raises(ConfigError, match=r"output\.path="):
            OutputFile.open(path, CONFIG)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    real_write = os.write
    with OutputFile.open(path, CONFIG) as output:
        output.write(ok_line("a"))
        monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:10]))
        with pytest.raises(ConfigError, match=r"cannot write to .*out\.jsonl: No space left"):
            output.write(ok_line("b"))
    assert path.read_bytes() == ok_line("a")


def test_a_failed_rewrite_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    content = ok_line("a") + SYSTEM_ERROR
    path.write_bytes(content)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ConfigError, match="cannot repair"):
        OutputFile.open(path, CONFIG)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_the_saved_config_is_a_job_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    settings = config(dtype="float32", sampling={"stop": ["é", "b"]}, shard_weights=[2.0], seed=3)
    with OutputFile.open(path, settings) as output:
        output.save_config(settings)
    assert load_config(tmp_path / "out.jsonl.config.yaml") == settings


@pytest.mark.parametrize(
    ("changed", "key", "before", "now"),
    [
        ({"model": "other"}, "model", "'m'", "'other'"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature", "1.0", "0.0"),
        ({"sampling": {"stop": "x"}}, "sampling.stop", r"\[\]", r"\['x'\]"),
        ({"seed": 1}, "seed", "0", "1"),
        ({"chat_template": "t"}, "chat_template", "None", "'t'"),
        ({"dtype": "float16"}, "dtype", "'float32'", "'float16'"),
        ({"quantization": "int8"}, "quantization", "'none'", "'int8'"),
        ({"cache": {"dtype": "int4"}}, r"cache\.dtype", "'auto'", "'int4'"),
    ],
)
def test_settings_that_change_answers_are_refused_for_a_file_that_has_some(
    tmp_path: Path, changed: dict[str, Any], key: str, before: str, now: str
) -> None:
    path = tmp_path / "out.jsonl"
    first = config(dtype="float32")
    with OutputFile.open(path, first) as output:
        output.save_config(first)
    second = config(**{"dtype": "float32", **changed})
    OutputFile.open(path, second).close()  # no rows yet, so nothing to mix
    path.write_bytes(ok_line("a") + SYSTEM_ERROR)
    with pytest.raises(ConfigError, match=f"{key}: .* {before} and the job says {now}.* another output.path"):
        OutputFile.open(path, second)
    assert path.read_bytes() == ok_line("a") + SYSTEM_ERROR


def test_a_setting_that_the_older_file_does_not_have_had_its_default(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with OutputFile.open(path, config()) as output:
        output.save_config(config())
        output.write(ok_line("a"))
    saved = tmp_path / "out.jsonl.config.yaml"
    values = yaml.safe_load(saved.read_text())
    del values["task"], values["sampling"]["n"], values["cache"]
    saved.write_text(yaml.safe_dump(values))
    OutputFile.open(path, config()).close()
    with pytest.raises(ConfigError, match=r"sampling\.n: .* 1 and the job says 2"):
        OutputFile.open(path, config(sampling={"n": 2}))


def test_rows_that_all_failed_do_not_bind_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first, second = config(dtype="float16"), config(dtype="bfloat16")
    with OutputFile.open(path, first) as output:
        output.save_config(first)
        output.write(SYSTEM_ERROR)
    with OutputFile.open(path, second) as output:
        assert ids(path) == []
        output.save_config(second)
        output.write(ok_line("lost"))
    with pytest.raises(ConfigError, match=r"dtype: .* 'bfloat16' and the job says 'float16'"):
        OutputFile.open(path, first)


def test_an_empty_config_beside_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(ok_line("a"))
    (tmp_path / "out.jsonl.config.yaml").touch()
    with pytest.raises(
        ConfigError, match=r"out\.jsonl\.config\.yaml, the settings of the rows in .*, holds none"
    ):
        OutputFile.open(path, CONFIG)


def test_settings_that_only_change_speed_may_differ(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first = config(dtype="float32")
    with OutputFile.open(path, first) as output:
        output.save_config(first)
        output.write(ok_line("a"))
    again = config(dtype="auto", tensor_parallel_size=3, launcher="ray", scheduler={"max_num_seqs": 2})
    with OutputFile.open(path, again) as output:  # auto is compared once it is known
        with pytest.raises(ConfigError, match="dtype"):
            output.save_config(again.model_copy(update={"dtype": "bfloat16"}))
        output.save_config(again.model_copy(update={"dtype": "float32"}))
    saved = yaml.safe_load((tmp_path / "out.jsonl.config.yaml").read_text())
    assert saved["tensor_parallel_size"] == 3
    assert saved["dtype"] == "float32"

"""The output file as a journal: what counts as done, what is repaired, what is refused."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvshard.runtime.batch.output import OutputFile
from kvshard.runtime.errors import ConfigError

from .output_lines import CONFIG, INPUT_ERROR, SYSTEM_ERROR, ids, ok_line


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

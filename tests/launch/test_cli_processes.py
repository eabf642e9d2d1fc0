"""A job that is killed: the same command goes on, and every id is there exactly once."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

FAKES = Path(__file__).parents[1] / "runtime" / "batch" / "fakes.py"
NUM_ROWS = 120
MAX_NUM_SEQS = 4
MAX_TOKENS = 8
ALL_QUICK = 1_000_000  # steps
DEADLINE_S = 60.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [json.dumps({"id": f"r{number}", "prompt": "x" * 40}) for number in range(NUM_ROWS)]
    lines[60] = "{broken"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        "model": "some/model",
        "scheduler": {"max_num_seqs": MAX_NUM_SEQS},
        "sampling": {"max_tokens": MAX_TOKENS, "temperature": 0},
        "input": {"path": "rows.jsonl"},
        "output": {"path": "out.jsonl"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def start(folder: Path, num_quick_rows: int | None = None) -> "subprocess.Popen[str]":
    """The job; after so many rows, about, its steps are slow."""
    steps = ALL_QUICK if num_quick_rows is None else (num_quick_rows // MAX_NUM_SEQS + 1) * MAX_TOKENS
    command = [sys.executable, str(FAKES), str(steps), "run", str(folder / "job.yaml")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s, "not in time"
        time.sleep(0.001)


def num_lines(folder: Path) -> int:
    path = folder / "out.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else -1


def check_each_id_once(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]
    wanted = sorted([f"r{number}" for number in range(NUM_ROWS) if number != 60] + ["line-61"])
    assert sorted(line["custom_id"] for line in lines) == wanted
    for line in lines:
        if line["custom_id"] == "line-61":
            assert line["error"]["type"] == "input_error"
        else:
            assert line["response"]["body"]["choices"][0]["text"] == "ABCDEFGH"


def test_killed_again_and_again(folder: Path) -> None:
    rng = random.Random(7)
    for target in (0, 1, 30, 80):  # lines; 0: the file is there
        process = start(folder, target - max(num_lines(folder), 0))
        wait_until(lambda target=target: num_lines(folder) >= target, process)
        process.kill()
        process.communicate(timeout=DEADLINE_S)
        assert process.returncode == -signal.SIGKILL
        assert num_lines(folder) < NUM_ROWS
        # What a power cut may leave of one more line.
        line = b'{"id":"batch_req_0123456789abcdef01234567","custom_id":"r119","response":null}'
        with open(folder / "out.jsonl", "ab") as stream:
            stream.write(line[: rng.randrange(len(line))])
    process = start(folder)
    stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == (0 if "0 failed" in stdout else 1), stderr
    assert "done before" in stdout
    check_each_id_once(folder)

    process = start(folder)
    stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, stderr
    assert f"All {NUM_ROWS} rows are done already" in stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_130_and_a_whole_file(folder: Path, number: signal.Signals) -> None:
    process = start(folder, 9)
    wait_until(lambda: num_lines(folder) >= 9, process)
    os.kill(process.pid, number)
    stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "the same command runs the others" in stderr
    assert "interrupted" in stdout
    content = (folder / "out.jsonl").read_bytes()
    assert content.endswith(b"\n")
    num_done = num_lines(folder)
    assert 9 <= num_done < NUM_ROWS

    process = start(folder)
    stdout, _ = process.communicate(timeout=DEADLINE_S)
    assert f"{num_done} done before" in stdout
    assert (folder / "out.jsonl").read_bytes().startswith(content)
    check_each_id_once(folder)


def test_no_control_characters_without_a_terminal(folder: Path) -> None:
    process = start(folder)
    stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1  # the broken line
    for text in (stdout, stderr):
        assert not [character for character in text if ord(character) < 32 and character != "\n"]
    assert max(map(len, stderr.splitlines())) <= 110


def test_an_interrupt_amid_a_string_of_code_gives_the_exit_code(tmp_path: Path) -> None:
    """As in an import that defines dataclasses. Python would end `-m` by the signal."""
    (tmp_path / "job.py").write_text(
        "import sys\n"
        "from kvshard.launch.run import report_errors\n"
        "sys.exit(report_errors(lambda: exec('raise KeyboardInterrupt')))\n"
    )
    job = subprocess.run([sys.executable, "-m", "job"], cwd=tmp_path, capture_output=True, text=True)
    assert job.returncode == 130, job
    assert job.stderr.startswith("Interrupted.")

"""What a user can get wrong: one clear message and exit code 2, or one error row while the others finish."""

import json
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import JobRun, command, environment, run_job, write_job
from models_factory import make_gguf, make_model
from running_job import make_tiny_model

ROWS = [{"id": f"row{i}", "prompt": f"w{3 + i} w5", "max_tokens": 4} for i in range(3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny`, a good model of 6 heads; `nine`, one of 9 heads."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_model(folder / "tiny")
    make_tiny_model(folder / "nine", num_attention_heads=9, num_key_value_heads=3, head_dim=8, hidden_size=72)
    return folder


def corrupt_header(folder: Path) -> Path:
    make_tiny_model(folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"oops"
    path.write_bytes(data)
    return folder


def header_too_long(folder: Path) -> Path:
    make_tiny_model(folder)
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 10**15) + path.read_bytes()[8:])
    return folder


def truncated_gguf(folder: Path) -> Path:
    path = make_gguf(folder.with_suffix(".gguf"), make_model())
    path.write_bytes(path.read_bytes()[:-100])
    return path


def truncated_gguf_header(folder: Path) -> Path:
    path = make_gguf(folder.with_suffix(".gguf"), make_model())
    path.write_bytes(path.read_bytes()[:500])
    return path


def refused(folder: Path, config: dict[str, Any], rows: list[dict[str, Any]] | str = ROWS) -> str:
    """The one message of a job that cannot run."""
    done = run_job(write_job(folder, config, rows))
    return message_of(done.returncode, done.stderr)


def message_of(returncode: int, stderr: str) -> str:
    assert returncode == 2, stderr
    assert stderr.count("Error:") == 1, stderr
    assert "Traceback" not in stderr, stderr
    return stderr.partition("Error:")[2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"tensor_paralel_size": 2},
            ["job.yaml", "tensor_paralel_size", "did you mean tensor_parallel_size?"],
        ),
        ({"cache": {"blocksize": 16}}, ["cache.blocksize", "did you mean cache.block_size?"]),
        ({"tensor_parallel_size": "two"}, ["job.yaml", "tensor_parallel_size='two'", "integer"]),
        ({"scheduler": 5}, ["scheduler=5", "group of settings: scheduler.max_num_seqs"]),
        ({"shard_weights": [1.0, 2.0]}, ["shard_weights has 2 entries", "tensor_parallel_size=1"]),
        ({"model": "/nowhere/model.gguf"}, ["model=/nowhere/model.gguf", "no such file", "check the path"]),
        ({"model": "./nowhere"}, ["model=", "nowhere is not a directory"]),
    ],
)
def test_settings(settings: dict[str, Any], words: list[str], models: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, {"model": str(models / "tiny")} | settings)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (corrupt_header, ["model.safetensors", "corrupt safetensors header", "JSON", "fetch the file again"]),
        pytest.param(
            header_too_long,
            ["model.safetensors", "corrupt safetensors header", "claims"],
            marks=pytest.mark.slow,
        ),
        (truncated_gguf, [".gguf", "cut short", "bytes", "fetch it again"]),
        pytest.param(truncated_gguf_header, [".gguf", "cut short inside its header"], marks=pytest.mark.slow),
    ],
)
def test_damaged_models(damage: Callable[[Path], Path], words: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path / "job", {"model": str(damage(tmp_path / "damaged"))})
    for word in words:
        assert word in message


def test_more_shards_than_heads(models: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, {"model": str(models / "nine"), "tensor_parallel_size": 10})
    for word in ("tensor_parallel_size=10", "num_q_heads=9", "use 1 to 9"):
        assert word in message


@pytest.mark.parametrize("rows", ["", "\n  \n"])
def test_an_empty_prompt_file(rows: str, models: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, {"model": str(models / "tiny")}, rows)
    assert "input.path=" in message
    assert "is empty" in message


def test_a_missing_prompt_file(models: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, {"model": str(models / "tiny"), "input": {"path": "inputs.jsonl"}})
    assert "input.path=" in message
    assert "inputs.jsonl does not exist" in message


@pytest.mark.parametrize("path", ["folder", "input.jsonl/output.jsonl", "/proc/output.jsonl"])
def test_an_output_that_cannot_be_written(path: str, models: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    message = refused(tmp_path, {"model": str(models / "tiny"), "output": {"path": path}})
    assert "output.path=" in message
    assert path in message
    assert "name a file in a folder that you may write to" in message


def test_an_input_as_output(models: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, {"model": str(models / "tiny"), "output": {"path": "input.jsonl"}})
    assert "output.path" in message
    assert len((tmp_path / "input.jsonl").read_text().splitlines()) == len(ROWS)


def test_a_port_in_use(models: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, {"model": str(models / "tiny"), "launcher": "torchrun"}, ROWS)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = subprocess.run(
            command(job),
            capture_output=True,
            text=True,
            timeout=120,
            env=environment() | variables,
            check=False,
        )
    message = message_of(done.returncode, done.stderr)
    for word in (f"127.0.0.1:{port}", "in use", "--master-port"):
        assert word in message


def test_bad_rows_do_not_stop_the_others(models: Path, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS]
    lines[1:1] = [
        '{"id": "torn", "prompt": "w5',
        json.dumps({"id": "row0", "prompt": "w9"}),
        json.dumps({"id": "long", "prompt": "w5 " * 100}),
        json.dumps({"id": "typo", "prompt": "w5", "max_token": 3}),
        json.dumps({"id": "nothing", "prompt": ""}),
        json.dumps({"id": "foreign", "prompt_token_ids": [5, 101]}),
        json.dumps({"id": "chat", "messages": [{"role": "user", "content": "w5"}]}),
    ]
    config = {
        "model": str(models / "tiny"),
        "threads_per_shard": 1,
        "scheduler": {"max_model_len": 64},
        "cache": {"num_blocks": 16},
    }
    job = write_job(tmp_path, config, "\n".join(lines))
    done = run_job(job)
    assert done.returncode == 1, done.stderr
    for row in ROWS:
        assert done.rows[row["id"]]["error"] is None
        assert len(done.token_ids(row["id"])) == 4
    expected = {
        "line-2": ["input.jsonl line 2", "not valid JSON", "column"],
        "line-3": ["input.jsonl line 3", 'an earlier row has the id "row0"'],
        "long": ["100 prompt tokens", "64", "scheduler.max_model_len"],
        "typo": ["max_token ", "did you mean max_tokens?"],
        "nothing": ["empty"],
        "foreign": ["token id 101", "vocabulary of 101"],
        "chat": ["chat template", "set chat_template"],
    }
    assert done.rows.keys() == expected.keys() | {row["id"] for row in ROWS}
    for row_id, words in expected.items():
        error = done.rows[row_id]["error"]
        assert error["type"] == "input_error"
        for word in words:
            assert word in error["message"]
    assert f"{len(ROWS)} ok, {len(expected)} failed" in done.stdout
    _check_final(run_job(job), len(expected))


def _check_final(again: JobRun, num_failed: int) -> None:
    """Input errors stay errors, so nothing is started for them."""
    assert again.returncode == 0, again.stderr
    assert "done already" in again.stdout
    assert f"{num_failed} of them failed; --retry-failed" in again.stdout

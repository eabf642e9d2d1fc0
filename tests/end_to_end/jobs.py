"""Running jobs as a user does: a YAML file, `python -m kvshard run`, a JSONL file."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class JobRun:
    """What one `kvshard run` printed and wrote."""

    returncode: int
    stdout: str
    stderr: str
    rows: dict[str, dict[str, Any]]  # output lines by custom_id

    def body(self, row_id: str) -> dict[str, Any]:
        """A row's answers and what belongs to all of them, as they stand in the output."""
        body: dict[str, Any] = self.rows[row_id]["response"]["body"]
        return body

    def token_ids(self, row_id: str) -> list[int]:
        ids: list[int] = self.body(row_id)["choices"][0]["token_ids"]
        return ids

    def counter(self, name: str) -> int:
        """A number of the summary's scheduler line, like `preemptions`."""
        match = re.search(rf"(\d+) {name}", self.stdout)
        assert match is not None, f"no {name} in the summary:\n{self.stdout}"
        return int(match[1])


def write_job(folder: Path, config: dict[str, Any], rows: list[dict[str, Any]] | str) -> Path:
    """A job file with its input beside it; `rows` may be the raw text of the input."""
    folder.mkdir(parents=True, exist_ok=True)
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "input.jsonl").write_text(text)
    values = {"input": {"path": "input.jsonl"}, "output": {"path": "output.jsonl"}, **config}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(job: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvshard", "run", str(job), *arguments]


def environment() -> dict[str, str]:
    """Wide output, so that no line of the summary is folded; no torchrun variables of a caller."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TRITON_INTERPRET")
    }
    return clean | {"COLUMNS": "200"}


def run_job(job: Path, *arguments: str, timeout_s: float = 240) -> JobRun:
    done = subprocess.run(
        command(job, *arguments),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(),
        check=False,
    )
    return JobRun(done.returncode, done.stdout, done.stderr, read_output(job.parent / "output.jsonl"))


def read_output(path: Path) -> dict[str, dict[str, Any]]:
    """Output lines by id; every id must stand there once."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = {line["custom_id"]: line for line in lines}
    assert len(rows) == len(lines), "an id was written twice"
    return rows

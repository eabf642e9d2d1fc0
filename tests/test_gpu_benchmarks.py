"""The GPU benchmarks, dry: every part runs on the CPU, without what a GPU machine may lack."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GPU = ROOT / "benchmarks" / "gpu"
# Not on a machine that has torch, triton and transformers only.
LACKING = ("ray", "zmq", "pydantic", "gguf", "hypothesis", "flashinfer")


@pytest.fixture
def lacking(tmp_path: Path) -> dict[str, str]:
    """An environment in which those packages cannot be imported."""
    folder = tmp_path / "lacking"
    for name in LACKING:
        (folder / name).mkdir(parents=True)
        error = f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n"
        (folder / name / "__init__.py").write_text(error)
    return os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(folder)}


def run_sh(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(GPU / "run.sh"), *arguments],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_every_row_of_every_part_is_there(lacking: dict[str, str], tmp_path: Path) -> None:
    done = run_sh(["--dry", "--output", str(tmp_path / "results")], lacking)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("dry run: 9 parts, "), last
    assert "every row is there" in last
    page = (tmp_path / "results" / "README.md").read_text()
    for part in (path.stem for path in GPU.glob("*.py") if "run_part(" in path.read_text()):
        if part != "harness":
            assert f"## {part}\n" in page


def test_a_part_that_fails_is_said_and_stops_no_other(lacking: dict[str, str], tmp_path: Path) -> None:
    """A copy of the scripts in which one case of a part cannot be made, and another part cannot even start."""
    copied = tmp_path / "kvshard"
    shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(".*", "__pycache__", "results", "outputs"))
    broken = copied / "benchmarks" / "gpu" / "pointwise.py"
    broken.write_text(
        broken.read_text().replace("def activation(", "def activation(part, tokens): 1 / 0\ndef _old(")
    )
    (copied / "benchmarks" / "gpu" / "two_ranks.py").write_text("raise SystemExit(3)\n")
    done = subprocess.run(
        [str(copied / "benchmarks/gpu/run.sh"), "pointwise", "two_ranks", "virtual_ranks", "--dry", "--output", str(tmp_path / "out")],
        env=lacking, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    rows = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text())["rows"] for name in ("pointwise", "two_ranks", "virtual_ranks")}  # fmt: skip
    notes = {(row["case"], row["variant"]): row["note"] for row in rows["pointwise"]}
    assert notes["rms_norm, 3 tokens", "kvshard"] == ""
    assert notes["silu_mul, 3 tokens", "kvshard"].startswith("failed: ZeroDivisionError")
    assert [row["note"] for row in rows["two_ranks"]] == ["failed: ended with 3"]
    assert all(row["samples_us"] or row["note"].startswith("not here") for row in rows["virtual_ranks"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [(["no_such_part"], 2, "no part no_such_part"), (["pointwise"], 2, "finds no CUDA device")],
)
def test_what_cannot_be_run_is_said(
    lacking: dict[str, str], arguments: list[str], code: int, message: str
) -> None:
    done = run_sh(arguments, lacking | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == code
    assert message in done.stderr

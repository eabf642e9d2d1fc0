"""Every Triton kernel, compiled for sm_80, sm_89, sm_90 and sm_100 with no GPU: no spills, shared memory within limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def compile_all(folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "TRITON_DEFAULT_FP_FUSION": "1"}
    script = Path(__file__).parent / "compile_check.py"
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def misfits(reports):
    return [r for r in reports if r["spilled"] > 0 or r["shared"] > r["shared_limit"]]


@pytest.mark.slow
def test_no_kernel_spills(tmp_path):
    reports = compile_all(tmp_path)
    assert len(reports) == 4 * (2 + 2 + 4 + 10 * 2 + 1)
    assert misfits(reports) == []


@pytest.mark.slow
def test_a_tile_that_does_not_fit_is_found(tmp_path):
    """The largest tile on a single warp: the check above must see it spill."""
    assert misfits(compile_all(tmp_path, "--bad"))

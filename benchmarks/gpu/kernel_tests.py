"""The tests of the kernels, compiled for this machine's GPU: what is fast must first be right.

    benchmarks/gpu/run.sh kernel_tests

pytest runs tests/kernels without TRITON_INTERPRET, so that the Triton back end of every test is compiled. Left out
are files that launch nothing on a GPU. In the dry mode one interpreted test stands for all.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from harness import NotHereError, Part, run_part

ROOT = Path(__file__).resolve().parents[2]
CASE = "tests/kernels"
# Compiling ahead of time, the C compiler, the definitions themselves, and ranks that are interpreted processes.
NOT_ON_GPU = ("test_compile.py", "test_native.py", "test_reference.py", "test_peer_all_reduce.py")
DEADLINE_S = 240


def files(dry: bool) -> list[str]:
    if dry:
        return ["test_refill.py"]
    found = sorted(path.name for path in (ROOT / CASE).glob("test_*.py"))
    return [name for name in found if name not in NOT_ON_GPU]


def rows(dry: bool) -> list[tuple[str, str]]:
    return [(CASE, name) for name in files(dry)]


def run_tests(part: Part) -> dict[str, list[ElementTree.Element]]:
    """The outcomes by file."""
    if importlib.util.find_spec("pytest") is None:
        raise NotHereError("pytest is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            f"--junit-xml={report}",
        ]
        if part.dry:
            command += ["-k", "test_launches_keep_their_grids"]
            environment["CUDA_VISIBLE_DEVICES"] = ""
        elif importlib.util.find_spec("xdist") is not None:
            command += ["-n", "8"]  # most of the time goes into compiling
        command += [f"{CASE}/{name}" for name in files(part.dry)]
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=DEADLINE_S, check=False)
        if not report.exists():
            raise RuntimeError(f"pytest ended with {done.returncode} and no report")
        outcomes = defaultdict(list)
        for test in ElementTree.parse(report).iter("testcase"):
            # "tests.kernels.test_refill", or with a name behind it where tests are in classes
            place = (test.get("classname") or test.get("name") or "").split(".")
            outcomes[next((f"{name}.py" for name in place if name.startswith("test_")), "")].append(test)
        return outcomes


def summary(tests: list[ElementTree.Element]) -> str:
    """Raises AssertionError with the names of tests that failed."""
    bad = [t.get("name", "") for t in tests if t.find("failure") is not None or t.find("error") is not None]
    skipped = sum(t.find("skipped") is not None for t in tests)
    assert tests, "no test ran"
    assert not bad, f"{len(bad)} of {len(tests)}: {', '.join(bad)}"
    return f"{len(tests) - skipped} passed, {skipped} skipped"


def body(part: Part) -> None:
    outcomes = run_tests(part)
    for name in files(part.dry):
        part.once(CASE, name, lambda name=name: summary(outcomes[name]))
        row = part.rows[CASE, name]
        if row.samples_us:
            row.samples_us = [round(1e6 * sum(float(t.get("time", 0)) for t in outcomes[name]))]
    part.save()


if __name__ == "__main__":
    run_part("kernel_tests", __doc__, rows, body)

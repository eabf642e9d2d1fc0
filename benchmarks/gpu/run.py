"""Runs the parts one after another, each in a process of its own with a limit, and writes the page. See README.md."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE.parent / "results" / "gpu"
# Seconds each part may take. The first ones matter most: all together have TOTAL_S, and the last may be cut short.
LIMITS_S = {
    "kernel_tests": 150,
    "attention_decode": 110,
    "decode_step": 90,
    "pointwise": 40,
    "virtual_ranks": 40,
    "two_ranks": 60,
    "attention_prefill": 60,
    "decode_peers": 100,
}
SWEEP = {"tile_sweep": 540}  # takes a run of its own
EVERYTHING = LIMITS_S | SWEEP
TOTAL_S = 560
DRY_LIMIT_S = 250
ENOUGH_S = 5  # less is not worth a start
NOT_RUN = "not run"


class Runner:
    """Starts processes, and ends those that are left with all that they started."""

    def __init__(self, output: Path, environment: dict[str, str]) -> None:
        self._output = output
        self._environment = environment
        self._live: list[subprocess.Popen[bytes]] = []

    def start(self, script: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(HERE / f"{script}.py"), *options]
        process = subprocess.Popen(command, env=self._environment, process_group=0)
        self._live.append(process)
        return process

    def part(self, name: str, limit: float, *options: str) -> str | None:
        """Runs a part; None, or why it did not come to its end, which is then in its file too."""
        path = self._output / f"{name}.json"
        path.unlink(missing_ok=True)
        if limit < ENOUGH_S:
            return explain(name, path, f"no time left of {TOTAL_S} s")
        process = self.start(name, "--output", str(self._output), *options)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            self.stop(process)
            return explain(name, path, f"stopped after {limit:.0f} s")
        return None if code == 0 else explain(name, path, f"ended with {code}")

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop_all(self) -> None:
        for process in self._live:
            if process.poll() is None:
                self.stop(process)


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.sh", description="GPU benchmarks; README.md beside this file")
    names = f"{', '.join(EVERYTHING)}; all but the last if none is named"
    parser.add_argument("parts", nargs="*", metavar="PART", help=names)
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU, into a temporary folder")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.parts if name not in EVERYTHING]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(EVERYTHING)}")
    parts = arguments.parts or list(EVERYTHING if arguments.dry else LIMITS_S)
    if importlib.util.find_spec("torch") is None:
        print(
            f"run.sh: {sys.executable} has no torch; name an interpreter that has it: PYTHON=... run.sh",
            file=sys.stderr,
        )
        return 2
    if not arguments.dry and not has_gpu():
        print(
            "run.sh: torch finds no CUDA device; `run.sh --dry` tries the scripts on the CPU", file=sys.stderr
        )
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    with tempfile.TemporaryDirectory() as folder:
        output = arguments.output or (Path(folder) / "results" if arguments.dry else RESULTS)
        runner = Runner(output, environment(Path(folder), arguments.dry))
        run: Callable[[Runner, list[str], Path], int] = dry_run if arguments.dry else real_run
        try:
            return run(runner, parts, output)
        finally:
            runner.stop_all()


def environment(folder: Path, dry: bool) -> dict[str, str]:
    """The repository root is the package, whatever its folder is called: a link with the package's name makes it
    importable without installing it, which would ask for packages that such a machine lacks.
    """
    (folder / "kvshard").symlink_to(ROOT)
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    before = [variables["PYTHONPATH"]] if variables.get("PYTHONPATH") else []
    variables["PYTHONPATH"] = os.pathsep.join([str(folder), str(HERE.parent), *before])
    variables["PYTHONUNBUFFERED"] = "1"
    if dry:  # interpreted kernels, and no GPU even where there is one
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return variables


def has_gpu() -> bool:
    check = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def real_run(runner: Runner, parts: list[str], output: Path) -> int:
    deadline = time.monotonic() + TOTAL_S
    builder = None
    if importlib.util.find_spec("flashinfer") is not None and any("attention" in name for name in parts):
        builder = runner.start("flashinfer_build")
    failed = []
    for name in parts:
        if builder is not None and name.startswith("attention"):
            with suppress(subprocess.TimeoutExpired):
                builder.wait(LIMITS_S[name] / 2)
        print(f"== {name}", flush=True)
        if runner.part(name, min(EVERYTHING[name], deadline - time.monotonic())) is not None:
            failed.append(name)
        report.write(output)
    print((output / report.PAGE).read_text(encoding="utf-8"))
    print(
        f"{len(parts) - len(failed)} of {len(parts)} parts came to their end"
        + f"; not {failed}" * bool(failed)
    )
    return 1 if failed else 0


def dry_run(runner: Runner, parts: list[str], output: Path) -> int:
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        try:
            list(pool.map(lambda name: runner.part(name, DRY_LIMIT_S, "--dry"), parts))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop_all()
            raise
    report.write(output)
    faults = report.faults(output, parts)
    for fault in faults:
        print(fault, file=sys.stderr)
    num_rows = sum(len(part["rows"]) for part in report.read(output) if part["benchmark"] in parts)
    outcome = f"{len(faults)} faults" if faults else "every row is there"
    print(f"dry run: {len(parts)} parts, {num_rows} rows, {outcome}, {time.monotonic() - start:.0f} s")
    return 1 if faults else 0


def explain(name: str, path: Path, reason: str) -> str:
    """Puts the reason into the rows that did not run; makes the part's file if it has not come to that."""
    if path.exists():
        part = json.loads(path.read_text())
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"case": name, "variant": "", "note": NOT_RUN, "samples_us": []}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        machine = {"gpu": None, "processor": platform.machine()}
        part = {"benchmark": name, "date": date, "machine": machine, "versions": {}, "dry": False}
        part |= {"rows": [row], "targets": []}
    for row in part["rows"]:
        if row["note"] == NOT_RUN:
            row["note"] = f"failed: {reason}"
    path.write_text(json.dumps(part) + "\n")
    return reason


if __name__ == "__main__":
    sys.exit(main())

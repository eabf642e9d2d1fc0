"""Runs the parts one after another, each in a process of its own with a limit, and writes the page. See README.md."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import record
import report

HERE = Path(__file__).parent
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
TOTAL_S = 560
ENOUGH_S = 5  # less is not worth a start
NOT_RUN = "not run"


def main() -> int:
    everything = LIMITS_S | SWEEP
    parser = argparse.ArgumentParser(prog="run.sh", description="GPU benchmarks; README.md beside this file")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(everything)}; all but the last if none"
    )
    parser.add_argument(
        "--dry", action="store_true", help="every part, tiny, on the CPU, into a temporary folder"
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.parts if name not in everything]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(everything)}")
    parts = arguments.parts or list(everything if arguments.dry else LIMITS_S)
    if arguments.dry:
        with tempfile.TemporaryDirectory() as folder:
            return dry_run(parts, arguments.output or Path(folder))
    if not has_gpu():
        print(
            "run.sh: torch finds no CUDA device; `run.sh --dry` tries the scripts on the CPU", file=sys.stderr
        )
        return 2
    return real_run(parts, arguments.output or record.RESULTS / "gpu", everything)


def has_gpu() -> bool:
    check = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def real_run(parts: list[str], output: Path, limits: dict[str, int]) -> int:
    deadline = time.monotonic() + TOTAL_S
    builder = start_builder()
    failed = []
    for name in parts:
        if builder is not None and name.startswith("attention"):
            with suppress(subprocess.TimeoutExpired):
                builder.wait(max(min(limits[name], deadline - time.monotonic()) / 2, 0))
        limit = min(limits[name], deadline - time.monotonic())
        print(f"== {name}", flush=True)
        if run_one(name, output, limit, []) is not None:
            failed.append(name)
        report.write(output)
    if builder is not None:
        stop(builder)
    print((output / report.PAGE).read_text(encoding="utf-8"))
    print(
        f"{len(parts) - len(failed)} of {len(parts)} parts ran to their end"
        + (f"; not {failed}" if failed else "")
    )
    return 1 if failed else 0


def dry_run(parts: list[str], output: Path) -> int:
    start = time.monotonic()
    # Interpreted kernels, and no GPU even where there is one.
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: run_one(name, output, 300, ["--dry"]), parts))
    report.write(output)
    faults = report.faults(output, parts)
    for fault in faults:
        print(fault, file=sys.stderr)
    num_rows = sum(len(part["rows"]) for part in report.read(output))
    outcome = f"{len(faults)} faults" if faults else "every row is there"
    print(f"dry run: {len(parts)} parts, {num_rows} rows, {outcome}, {time.monotonic() - start:.0f} s")
    return 1 if faults else 0


def run_one(name: str, output: Path, limit: float, options: list[str]) -> str | None:
    """Runs a part; None, or why it did not come to its end, which is then in its file too."""
    path = output / f"{name}.json"
    path.unlink(missing_ok=True)
    if limit < ENOUGH_S:
        return explain(name, path, f"no time left of {TOTAL_S} s")
    process = subprocess.Popen(
        [sys.executable, str(HERE / f"{name}.py"), "--output", str(output), *options], start_new_session=True
    )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        stop(process)
        return explain(name, path, f"stopped after {limit:.0f} s")
    except BaseException:
        stop(process)
        raise
    return None if code == 0 else explain(name, path, f"ended with {code}")


def explain(name: str, path: Path, reason: str) -> str:
    """Puts the reason into the rows that did not run; makes the part's file if it has not come to that."""
    if path.exists():
        part = json.loads(path.read_text())
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"case": name, "variant": "", "note": NOT_RUN, "samples_us": []}
        part = record.describe(name) | {"dry": False, "rows": [row], "targets": []}
    for row in part["rows"]:
        if row["note"] == NOT_RUN:
            row["note"] = f"failed: {reason}"
    path.write_text(json.dumps(part) + "\n")
    return reason


def start_builder() -> subprocess.Popen[bytes] | None:
    if importlib.util.find_spec("flashinfer") is None:
        return None
    command = [sys.executable, str(HERE / "flashinfer_build.py")]
    return subprocess.Popen(command, start_new_session=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())

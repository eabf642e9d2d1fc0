"""What every benchmark writes beside its samples: when, on what machine, with which versions."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def parser(benchmark: str, description: str | None) -> argparse.ArgumentParser:
    """With the option that all have: where the result goes."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--output", type=Path, default=RESULTS / f"{benchmark}.json")
    return made


def describe(benchmark: str) -> dict[str, Any]:
    """Make it before the measuring starts: it holds the load that others put on the machine."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "gpu": _gpu(),
            "system": platform.platform(),
            "load_average_before": os.getloadavg()[0],
        },
        "versions": {"python": sys.version.split()[0], "torch": version("torch"), "kvshard": _commit()},
    }


def _commit() -> str:
    """The commit of this checkout, and whether anything but results was changed since."""

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False
        )
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--", "..", ":!results")
    return (git("rev-parse", "--short", "HEAD") or "no commit") + (", changed" if changed else "")


def _gpu() -> str | None:
    torch = sys.modules.get(
        "torch"
    )  # not imported for this: some benchmarks measure processes that have no torch
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


def percentile_99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


def write(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    print(f"samples: {path}")

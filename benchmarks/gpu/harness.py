"""What the parts share: variants that take turns, device times, and rows that survive what fails.

A part declares the rows of its table first, and fills them case by case. Its file is written after every case, so
that a part which is stopped, or fails half way, leaves what it has; a row says then why it has no figure.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
from torch import Tensor

Run = Callable[[int], object]  # takes the number of the call, to pick the next set of inputs
RESULTS = record.RESULTS / "gpu"
NOT_RUN = "not run"
WARM_UP = 3
# The host is this far ahead before a timed call starts, so that its launches are not timed: about half a
# millisecond on an H100.
_HEAD_START_CYCLES = 1_000_000
_CACHE_BYTES = 64 << 20  # the largest L2 cache of the devices that this is for


class NotHereError(Exception):
    """What this machine does not have; the message goes into the table."""


@dataclass
class Row:
    """A variant of a case. amount: bytes that must move, or operations, of one call."""

    case: str
    variant: str
    note: str = NOT_RUN  # why there are no samples; empty if there are
    remark: str = ""  # what the samples alone do not say
    amount: float = 0.0
    unit: str = "bytes"
    samples_us: list[float] = field(default_factory=list)


@dataclass
class Target:
    """A claim of the part: the figure must be at least, or at most, the bound. figure: None if a row is missing."""

    claim: str
    bound: float
    at_least: bool
    figure: float | None


class Part:
    """One part's rows. device and dry say where and how to run; sizes come from the part."""

    def __init__(self, name: str, rows: Sequence[tuple[str, str]], output: Path, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.iterations = 2 if dry else 50
        self.rows = {key: Row(*key) for key in rows}
        self._targets: list[Target] = []
        self._path = output / f"{name}.json"
        self._record = record.describe(name) | {"dry": dry}
        self._record["versions"] |= {"cuda": torch.version.cuda} | {
            p: _version(p) for p in ("triton", "numpy", "transformers", "flashinfer-python")
        }
        self.save()

    def save(self) -> None:
        rows, targets = ([asdict(x) for x in xs] for xs in (self.rows.values(), self._targets))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._record | {"rows": rows, "targets": targets}) + "\n")

    def note(self, case: str, variant: str, error: BaseException | str) -> None:
        """Says in the table why a variant has no figure."""
        self.rows[case, variant].note = error if isinstance(error, str) else _reason(error)

    def measure(
        self,
        case: str,
        makers: dict[str, Callable[[], Run]],
        amounts: dict[str, float] | float,
        *,
        unit: str = "bytes",
        repeat: int = 1,
    ) -> None:
        """Times the variants of a case in turns; `repeat` calls make a sample.

        A maker prepares a variant, and may raise: NotHereError, or anything else for a failure.
        """
        runs = self._prepared(case, makers)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for iteration in range(WARM_UP + self.iterations if not self.dry else self.iterations):
            names = list(runs)
            cut = iteration % max(len(names), 1)  # nobody always runs behind the same neighbour
            for name, us in self._turn({x: runs[x] for x in names[cut:] + names[:cut]}, iteration, repeat):
                samples[name].append(us / repeat)
        for name, values in samples.items():
            row = self.rows[case, name]
            row.note, row.samples_us = "", [round(x, 2) for x in values[0 if self.dry else WARM_UP :]]
        for name in makers:
            row = self.rows[case, name]
            row.amount = amounts[name] if isinstance(amounts, dict) else amounts
            row.unit = unit
        self._finish_case()

    def stream(self, case: str, makers: dict[str, Callable[[], Run]], amounts: dict[str, float]) -> None:
        """Times steps that follow one another, each from the end of the last one: what the host cannot keep up with
        counts. Variants take turns of many steps.
        """
        runs = self._prepared(case, makers)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        steps = 3 if self.dry else 16
        for _ in range(1 if self.dry else 3):
            for name, run in runs.items():
                marks = []
                for step in range(steps):
                    marks.append(self._mark())
                    run(step)
                marks.append(self._mark())
                times = self._between(marks)
                samples[name] += (
                    times[1:] if self.dry else times[4:]
                )  # the first ones had the queue to themselves
        for name, values in samples.items():
            row = self.rows[case, name]
            row.note, row.amount, row.samples_us = "", amounts[name], [round(x, 2) for x in values]
        self._finish_case()

    def once(self, case: str, variant: str, work: Callable[[], object]) -> None:
        """A check rather than a time: it passed if the row has a sample, and that says how long it took.

        What `work` returns is its remark.
        """
        row = self.rows[case, variant]
        start = time.perf_counter()
        try:
            remark = work()
            row.note, row.samples_us = "", [round((time.perf_counter() - start) * 1e6)]
            row.remark = "passed" if remark is None else str(remark)
        except Exception as error:  # noqa: BLE001 - it goes into the table
            self.note(case, variant, error)
        self._finish_case()

    def target(self, claim: str, bound: float, figure: float | None, *, at_least: bool = True) -> None:
        self._targets.append(Target(claim, bound, at_least, figure))
        self.save()

    def ratio(self, case: str, over: str, under: str) -> float | None:
        """Time of `over` by time of `under`, of neighbours in time; None if one of them is missing."""
        a, b = self.rows[case, over].samples_us, self.rows[case, under].samples_us
        return median(x / y for x, y in zip(a, b, strict=False)) if a and b else None

    def share(self, case: str, variant: str, ceiling: str = "copy") -> float | None:
        """The rate of a variant as a share of the rate of the case's ceiling."""
        ratio = self.ratio(case, ceiling, variant)
        if ratio is None:
            return None
        return ratio * self.rows[case, variant].amount / self.rows[case, ceiling].amount

    def _prepared(self, case: str, makers: dict[str, Callable[[], Run]]) -> dict[str, Run]:
        runs = {}
        for name, make in makers.items():
            try:
                run = make()
                run(0)
                self.synchronize()
                runs[name] = run
            except Exception as error:  # noqa: BLE001 - it goes into the table
                self.note(case, name, error)
        return runs

    def _turn(self, runs: dict[str, Run], iteration: int, repeat: int) -> list[tuple[str, float]]:
        marks = {}
        for name, run in runs.items():
            if not self.dry:
                torch.cuda._sleep(_HEAD_START_CYCLES)
            start = self._mark()
            for i in range(repeat):
                run(iteration * repeat + i)
            marks[name] = [start, self._mark()]
        return [(name, self._between(pair)[0]) for name, pair in marks.items()]

    def _mark(self) -> Any:
        if self.dry:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, marks: list[Any]) -> list[float]:
        """Microseconds from each mark to the next."""
        self.synchronize()
        pairs = pairwise(marks)
        return [(b - a) * 1e6 if self.dry else a.elapsed_time(b) * 1e3 for a, b in pairs]

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def _finish_case(self) -> None:
        self.save()
        if not self.dry:
            torch.cuda.empty_cache()


def copy_of(part: Part) -> tuple[Callable[[], Run], float]:
    """The ceiling of what moves bytes: a large copy, and the bytes it reads and writes."""
    source = torch.randn((1 << 14) if part.dry else (256 << 20), device=part.device).bfloat16()
    target = torch.empty_like(source)
    return lambda: lambda _: target.copy_(source), 2.0 * source.nbytes


def product_of(part: Part) -> tuple[Callable[[], Run], float]:
    """The ceiling of what multiplies: a large bfloat16 matrix product, and its operations."""
    n = 64 if part.dry else 8192
    a, b = (torch.randn(n, n, device=part.device).bfloat16() for _ in "ab")
    return lambda: lambda _: a @ b, 2.0 * n**3


def sets_for(num_bytes: float, dry: bool) -> int:
    """How many sets of inputs of this size take turns, so that none is still in the device's cache."""
    return 2 if dry else max(2, math.ceil(4 * _CACHE_BYTES / num_bytes))


def check(got: Tensor, expected: Tensor, bound: float) -> float:
    """||got - expected|| / ||expected||. Raises if it is over the bound, or NaN."""
    error = float((got.float() - expected.float()).norm() / expected.float().norm())
    if not error <= bound:
        raise AssertionError(f"wrong by {error:.2g} of its norm, allowed are {bound:g}")
    return error


def run_part(
    name: str,
    doc: str | None,
    rows: Callable[[bool], Sequence[tuple[str, str]]],
    body: Callable[[Part], None],
) -> None:
    """A part's main: `rows` of its table, dry or not, and its body. What the body raises goes into the rows left."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU; times mean nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.dry:
        torch.set_num_threads(1)
    part = Part(name, rows(arguments.dry), arguments.output, arguments.dry)
    try:
        with torch.inference_mode():
            body(part)
    except Exception as error:
        for row in part.rows.values():
            if row.note == NOT_RUN:
                row.note = _reason(error)
        part.save()
        raise


def _reason(error: BaseException) -> str:
    if isinstance(error, NotHereError):
        return f"not here: {error}"
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:160]}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

"""What a decode step costs against context length, batch and number of shards, as a table and a plot.

    python benchmarks/scaling.py

Claim: attention grows linearly with the context, and a step costs the same for more rows until the processor has as much
to compute as the memory has to read. Each step time is the difference of two runs over the same prompts, found in the
prefix cache: one of 1 token a row and one of 1 + STEPS. Points are measured in turns, and the fastest of each counts for the
plot; all samples are kept.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import record
from demo_checkpoint import demo_checkpoint
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvshard import LLM, SamplingParams

STEPS = 16
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SIZES = (1, 2, 3, 5, 9)
SHORT = 128  # tokens of context where batch or size is what changes
FEW = 8  # rows where size is what changes
BLOCK = 16


class Point:
    """Rows of one length on one number of shards."""

    def __init__(self, axis: str, value: int, rows: int, context: int) -> None:
        self.axis, self.value = axis, value
        chance = random.Random(f"{rows} {context}")
        self._prompts = [
            {"prompt_token_ids": [chance.randrange(1000, 40000) for _ in range(context)]} for _ in range(rows)
        ]
        self.step_ms: list[float] = []

    def fill_cache(self, llm: LLM) -> None:
        self._run(llm, 1)

    def measure(self, llm: LLM) -> None:
        first, whole = (self._run(llm, count) for count in (1, 1 + STEPS))
        assert first < whole, (
            f"{self.axis} {self.value}: the prompts of the shorter run were not in the cache"
        )
        self.step_ms.append(round((whole - first) / STEPS * 1e3, 3))

    def _run(self, llm: LLM, count: int) -> float:
        start = time.perf_counter()
        llm.generate(
            self._prompts, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        )
        return time.perf_counter() - start


def points_by_size() -> dict[int, list[Point]]:
    points = {size: [Point("shards", size, FEW, SHORT)] for size in SIZES}
    points[1] += [Point("context", length, 1, length) for length in LENGTHS]
    points[1] += [Point("rows", rows, rows, SHORT) for rows in BATCHES]
    return points


def start(size: int, model: Path) -> LLM:
    rows = sum(BATCHES) + FEW if size == 1 else FEW
    tokens = sum(LENGTHS) + rows * (SHORT + 2 * BLOCK)  # of all points: every prompt stays in the cache
    return LLM(
        model,
        dtype="bfloat16",
        device="cpu",
        tensor_parallel_size=size,
        cache={"num_blocks": tokens * 5 // 4 // BLOCK, "block_size": BLOCK},
        scheduler={"max_num_seqs": max(BATCHES), "max_model_len": max(LENGTHS) + 2 * STEPS},
    )


def plot(points: list[Point], path: Path, title: str) -> None:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(1, 3), ("context", "rows", "shards"), strict=True):
        own = [point for point in points if point.axis == name]
        middle = [median(point.step_ms) for point in own]
        below = [now - min(point.step_ms) for now, point in zip(middle, own, strict=True)]
        above = [max(point.step_ms) - now for now, point in zip(middle, own, strict=True)]
        axis.errorbar([point.value for point in own], middle, yerr=(below, above), marker="o", capsize=3)
        if name != "shards":
            axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xticks([point.value for point in own], [str(point.value) for point in own], fontsize=7)
        axis.set_xlabel(
            {"context": "tokens of context, one row", "rows": f"rows of {SHORT} tokens"}.get(
                name, f"shards, {FEW} rows"
            )
        )
        axis.set_ylabel("ms a decode step")
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = record.parser("scaling", __doc__)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    result = record.describe("scaling")
    model = demo_checkpoint(2 * max(LENGTHS))
    points: list[Point] = []
    for size, own in points_by_size().items():
        llm = start(size, model)
        try:
            for repeat in range(-1, arguments.repeats):
                for point in own:
                    if repeat < 0:
                        point.fill_cache(llm)
                    else:
                        point.measure(llm)
        finally:
            llm.close()
        points += own
        for point in own:
            print(f"{point.axis} {point.value}: {median(point.step_ms):.2f} ms a step", flush=True)
    lines = [
        "# What a decode step costs",
        "",
        f"SmolLM2-135M in bfloat16, {result['date']}, {result['machine']['processor']}, {os.cpu_count()} cores. Context: one row, one "
        f"shard. Rows: {SHORT} tokens each, one shard. Shards: {FEW} rows of {SHORT} tokens.",
        "",
        "| | | median ms a step | range |",
        "|---|---|---|---|",
        *(
            f"| {point.axis} | {point.value} | {median(point.step_ms):.2f} | {min(point.step_ms):.2f} - {max(point.step_ms):.2f} |"
            for point in points
        ),
    ]
    print("\n".join(lines[4:]))
    arguments.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    plot(points, arguments.output.with_suffix(".png"), lines[2].partition(". ")[0])
    samples: list[dict[str, Any]] = [
        {"axis": point.axis, "value": point.value, "step_ms": point.step_ms} for point in points
    ]
    record.write(result | {"steps": STEPS, "samples": samples}, arguments.output)


if __name__ == "__main__":
    main()

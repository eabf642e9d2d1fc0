"""A batch job on a coordinator without a model."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvshard.runtime.batch.job import run_batch
from kvshard.runtime.batch.output import OutputFile
from kvshard.runtime.batch.records import BadRow, Row
from kvshard.runtime.config import JobConfig, parse_config
from kvshard.runtime.observe.progress import NoProgress
from kvshard.runtime.observe.summary import BatchSummary
from kvshard.runtime.sampling_params import SamplingParams

from .fakes import FakeEngine

SAMPLING = SamplingParams(temperature=0, max_tokens=3)


def make_config(task: str = "generate", **scheduler: Any) -> JobConfig:
    values = {"model": "m", "task": task, "scheduler": {"max_num_seqs": 4, **scheduler}}
    return parse_config(values, "test")


def rows(count: int, sampling: SamplingParams = SAMPLING) -> Iterator[Row | BadRow]:
    return (Row(f"r{number}", "prompt", False, sampling) for number in range(count))


class Watched(NoProgress):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.last = (0, 0, 0)

    def update(self, num_done: int, num_failed: int, num_tokens: int) -> None:
        self.last = (num_done, num_failed, num_tokens)


def run(
    path: Path,
    source: Iterator[Row | BadRow],
    engine: FakeEngine | None = None,
    stop: threading.Event | None = None,
    progress: Watched | None = None,
) -> tuple[BatchSummary, list[Any]]:
    engine = engine or FakeEngine(make_config())
    with OutputFile.open(path, engine.config) as output:
        summary = run_batch(engine, source, output, progress or Watched(), stop or threading.Event())
    return summary, [json.loads(line) for line in path.read_bytes().splitlines()]

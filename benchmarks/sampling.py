"""Time of choosing tokens on the CPU: 32 rows of 49152 logits, one rank, all rows with the same settings.

Claim: sampling costs little more than reading the logits, where noise for every token in torch cost more than 10 times as much.

    python benchmarks/sampling.py --rows 32 --vocabulary 49152 --threads 1
    git worktree add /tmp/before/kvshard COMMIT && PYTHONPATH=/tmp/before python benchmarks/sampling.py --output before.json
    python benchmarks/sampling.py --compare before.json

Settings take turns within an iteration. The interface of the sampler is all that is used, so the script also measures
older versions, which cannot be loaded into the same process: --compare puts a file of such a run beside this run's
medians. Logits are normal with a standard deviation of 3, as spread as those of a small model.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median

import numpy as np
import record
import torch

from kvshard.parallel.group import Group
from kvshard.runtime.coordinator.plan import SlotSampling
from kvshard.runtime.shard.sampler import Sampler

CPU = torch.device("cpu")
WARM_UP = 3
KINDS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "plain sampling": {},
    "min-p 0.05": {"min_p": 0.05},
    "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_p": 0.95},
    "top-k 50, top-p 0.95": {"top_k": 50, "top_p": 0.95},
    "greedy, logprobs": {"temperature": 0.0, "logprobs": 0},
}


def sampler_of(rows: int, vocabulary: int, changes: dict[str, float]) -> Sampler:
    values = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "logprobs": None, "stop_from": 0}
    sampler = Sampler(Group.single(CPU), range(vocabulary), vocabulary, rows, CPU)
    for slot in range(rows):
        sampler.open(slot, SlotSampling(**values | changes, seed=slot, stop_ids=()))
    return sampler


def main() -> None:
    parser = record.parser("sampling", __doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--compare", type=Path, help="result of a run of another version")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = record.describe("sampling")
    logits = torch.randn(arguments.rows, arguments.vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    slots = np.arange(arguments.rows, dtype=np.int32)
    samplers = {
        name: sampler_of(arguments.rows, arguments.vocabulary, changes) for name, changes in KINDS.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in KINDS}
    for iteration in range(WARM_UP + arguments.iterations):
        positions = np.full(arguments.rows, iteration, np.int64)
        for name, sampler in samplers.items():
            start = time.perf_counter_ns()
            sampler.sample(logits, slots, positions)
            samples[name].append(round((time.perf_counter_ns() - start) / 1e6, 3))
    samples = {name: values[WARM_UP:] for name, values in samples.items()}
    before = json.loads(arguments.compare.read_text())["median"] if arguments.compare else {}
    print(f"{arguments.rows} rows x {arguments.vocabulary} tokens, {arguments.threads} threads, ms a call")
    print("| | before | median | p10 - p90 |\n|---|---|---|---|")
    for name, values in samples.items():
        ordered = sorted(values)
        spread = f"{ordered[len(values) // 10]:.2f} - {ordered[len(values) * 9 // 10]:.2f}"
        old = f"{before[name]:.2f}" if name in before else ""
        print(f"| {name} | {old} | {median(values):.2f} | {spread} |")
    result |= {
        "arguments": {k: v for k, v in vars(arguments).items() if not isinstance(v, Path | None)},
        "unit": "milliseconds a call, by settings",
        "median": {name: median(values) for name, values in samples.items()},
        "median_before": before,
        "samples": samples,
    }
    record.write(result, arguments.output)


if __name__ == "__main__":
    main()

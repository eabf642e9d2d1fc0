"""What a step takes when other processes want the cores too.

Claim: with one or two other busy processes on two cores a token takes at most three times as long: near
what the share of the cores explains (1.5 and 2), and not the scheduler's turns once for every operation of a step.

    python benchmarks/contention.py

The demo model in bfloat16, one shard in this process, one thread a core. Busy processes count as fast as they can. Medians of
requests in turn: none busy, one, two, none, ...
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import record

from kvshard import LLM, SamplingParams

PROMPT_TOKENS, NEW_TOKENS, ROWS = 128, 32, 32


def count(begun: multiprocessing.synchronize.Event) -> None:
    begun.set()
    number = 0
    while True:
        number += 1


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that do nothing but count."""
    context = multiprocessing.get_context("spawn")
    begun = [context.Event() for _ in range(processes)]
    others = [context.Process(target=count, args=(event,), daemon=True) for event in begun]
    try:
        for other in others:
            other.start()
        for event in begun:
            event.wait()
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def ms_a_token(llm: LLM, rows: int, rng: random.Random) -> float:
    """Of each row, after its first."""

    def seconds(new_tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [rng.randrange(1000, 40000) for _ in range(PROMPT_TOKENS)]}
            for _ in range(rows)
        ]
        settings = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, settings)
        return time.perf_counter() - start

    first = seconds(1)
    return (seconds(1 + NEW_TOKENS) - first) / NEW_TOKENS * 1e3


def main() -> None:
    parser = record.parser("contention", __doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    result = record.describe("contention")
    rng, cores = random.Random(1), len(os.sched_getaffinity(0))
    llm = LLM(
        "demo",
        dtype="bfloat16",
        device="cpu",
        cache={"prefix_caching": False},
        scheduler={"max_num_seqs": ROWS, "max_model_len": 256},
    )
    ms_a_token(llm, ROWS, rng)
    samples: dict[str, list[float]] = {}
    for _ in range(arguments.repeats):
        for others in (0, 1, 2):
            with busy(others):
                for rows in (1, ROWS):
                    samples.setdefault(f"{others} busy, {rows} rows", []).append(ms_a_token(llm, rows, rng))
    llm.close()
    print(f"milliseconds a token on {cores} cores, medians (range) of {arguments.repeats}")
    print("| busy processes | 1 row | | 32 rows | |\n|---|---|---|---|---|")
    for others in (0, 1, 2):
        cells = []
        for rows in (1, ROWS):
            values, alone = samples[f"{others} busy, {rows} rows"], median(samples[f"0 busy, {rows} rows"])
            cells.append(
                f"{median(values):.1f} ({min(values):.1f} - {max(values):.1f}) | {median(values) / alone:.2f}x"
            )
        print(f"| {others} | {' | '.join(cells)} |")
    record.write(result | {"arguments": {"repeats": arguments.repeats}, "samples": samples}, arguments.output)


if __name__ == "__main__":
    main()

"""Time of one all-reduce on the CPU: shared memory (C and Python) against gloo.

Claim: for the payloads of decode steps, shared memory takes a small part of gloo's time.

    python benchmarks/all_reduce.py --world-sizes 2 4 --iterations 300

The back ends take turns within each iteration, so that a busy moment of the machine hits all of them, and the ranks
meet before each call, so that no back end pays for the one before it. Times are rank 0's, from call to return. "gloo all_reduce" is torch's own; "gloo" is ours, which sums in rank order.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from statistics import median

import record
import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from kvshard.parallel.group import Group

SHAPES = [(1, 576), (32, 576), (8, 4096), (32, 4096), (512, 576)]
DTYPES = [torch.float32, torch.bfloat16]
BACKENDS = ["gloo all_reduce", "gloo", "shared memory, Python", "shared memory, C"]
WARM_UP = 20
DEADLINE_S = 600

Samples = dict[str, dict[str, list[float]]]


def connect_all(
    store: TCPStore, rank: int, world_size: int
) -> tuple[dict[str, Callable[[Tensor], object]], Callable[[], None]]:
    """An all-reduce per back end, and a barrier."""

    def connect(epoch: int, host_id: str, expected: str) -> Group:
        group = Group.connect(
            store,
            rank=rank,
            world_size=world_size,
            epoch=epoch,
            job_id="benchmark",
            device="cpu",
            host_id=host_id,
            timeout_s=60,
            max_bytes=1 << 20,
            interface="lo",
        )
        assert group.backend == expected, f"wanted {expected}, got {group.backend}"
        return group

    peer = ProcessGroupGloo(PrefixStore("peer", store), rank, world_size, timedelta(seconds=60))
    native = connect(0, "host", "shared_memory")
    path, os.environ["PATH"] = os.environ["PATH"], ""  # with no compiler in sight the ring is Python's
    python = connect(1, "host", "shared_memory")
    os.environ["PATH"] = path
    gloo = connect(2, f"host {rank}", "gloo")
    reduce_by: list[Callable[[Tensor], object]] = [lambda x: peer.allreduce([x]).wait()]
    reduce_by += [partial(group.all_reduce, where="benchmark") for group in (gloo, python, native)]
    return dict(zip(BACKENDS, reduce_by, strict=True)), partial(native.barrier, "benchmark")


def measure(pipe: Connection, rank: int, world_size: int, port: int, iterations: int) -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    reduce_by, meet = connect_all(store, rank, world_size)
    samples: Samples = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            times: dict[str, list[float]] = {name: [] for name in BACKENDS}
            x = torch.zeros(shape, dtype=dtype)
            for _ in range(WARM_UP + iterations):
                for name, reduce in reduce_by.items():
                    meet()
                    start = time.perf_counter_ns()
                    reduce(x)
                    times[name].append(round((time.perf_counter_ns() - start) / 1000, 1))
            key = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
            samples[key] = {name: values[WARM_UP:] for name, values in times.items()}
    store.set(f"done/{rank}", "")
    store.wait([f"done/{r}" for r in range(world_size)])  # nobody leaves while others still need it
    pipe.send(samples)
    pipe.close()
    os._exit(0)


def run(world_size: int, iterations: int) -> Samples:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ours, theirs = zip(*(context.Pipe(duplex=False) for _ in range(world_size)), strict=True)
    processes = [
        context.Process(target=measure, args=(theirs[rank], rank, world_size, store.port, iterations))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for pipe in theirs:
        pipe.close()
    try:
        if not ours[0].poll(DEADLINE_S):
            raise TimeoutError(f"no result within {DEADLINE_S} s")
        samples: Samples = ours[0].recv()
    finally:
        for process in processes:
            process.kill()
            process.join()
    return samples


def table(world_size: int, samples: Samples) -> str:
    lines = [
        f"{world_size} ranks: median (p99), microseconds",
        "| payload | " + " | ".join(BACKENDS) + " |",
        "|---|" + "---|" * len(BACKENDS),
    ]
    for payload, by_backend in samples.items():
        cells = [f"{median(by_backend[b]):.1f} ({record.percentile_99(by_backend[b]):.0f})" for b in BACKENDS]
        lines.append(f"| {payload} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = record.parser("all_reduce", __doc__)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--iterations", type=int, default=300)
    arguments = parser.parse_args()
    result = record.describe("all_reduce")
    results = {}
    for world_size in arguments.world_sizes:
        results[world_size] = run(world_size, arguments.iterations)
        print(table(world_size, results[world_size]), end="\n\n")
    result |= {
        "iterations": arguments.iterations,
        "unit": "microseconds, rank 0, by world size, payload and back end",
        "median": {
            n: {payload: {b: median(v) for b, v in by.items()} for payload, by in samples.items()}
            for n, samples in results.items()
        },
        "samples": results,
    }
    record.write(result, arguments.output)


if __name__ == "__main__":
    main()

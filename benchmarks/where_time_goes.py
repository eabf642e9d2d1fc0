"""Where the time of a step goes on the CPU, operation by operation, beside what each must read or compute at least.

    python benchmarks/where_time_goes.py --threads 2

Steps of the demo model: decode of 1 row and of 32 rows, decode with a prompt beside it, a short prompt, and a chunk of 1,024
prompt tokens. Operations are timed around their calls, with steps run through Python, and all else is what is left of those
steps; the last lines give the whole step with nothing timed inside, and as it is played (kernels/cpu/tape.py). Floors: bytes over the rate at which the machine read 256 MB just before, or
multiply-adds over the rate of a product of 2,048 x 2,048, torch's (in float32 where it has no fast bfloat16) or kvshard's own,
whichever takes longer.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import ge
from statistics import median
from typing import Any
from unittest import mock

import record
import torch

import kvshard.parallel.embedding
import kvshard.parallel.linear
from kvshard import LLM, SamplingParams
from kvshard.kernels import ops
from kvshard.kernels.linear_ops import LinearWeight, linear
from kvshard.runtime.shard.recorded_steps import RecordedSteps
from kvshard.runtime.shard.worker import Worker

READ_BYTES, SIDE = 256 << 20, 2048
WIDTHS = {
    (960, 576): "qkv",
    (576, 576): "o",
    (3072, 576): "gate, up and activation",
    (576, 1536): "down",
    (49152, 576): "LM head",
}
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 30, 9, 3, 64


@dataclass
class Case:
    """Prompts of so many tokens that get so many new ones, and the kind of step that is timed among theirs."""

    name: str
    prompts: list[int]
    max_tokens: list[int]
    new_tokens: list[int]  # of each row of the step
    contexts: list[int]  # tokens of each row when the step ends; rows of one token may have 16 fewer
    ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # a step, by operation
    else_ms: list[float] = field(default_factory=list)  # of the same steps
    whole_ms: list[float] = field(default_factory=list)
    played_ms: list[float] = field(default_factory=list)


CASES = [
    Case("decode, 1 row of 192 tokens", [168], [24], [1], [192]),
    Case("decode, 32 rows of 192 tokens", [168] * 32, [24] * 32, [1] * 32, [192] * 32),
    Case(
        "31 rows of 192 tokens and a prompt of 40",
        [168] * 32 + [40],  # it comes in when the 32nd row ends
        [24] * 31 + [16, 1],
        [1] * 31 + [40],
        [192] * 31 + [40],
    ),
    Case("prefill, a prompt of 128 tokens", [128], [1], [128], [128]),
    Case("prefill, the second 1,024 tokens of a prompt", [2048], [1], [1024], [2048]),
]


def floors(case: Case, number_bytes: int, read_rate: float, flop_rate: float) -> dict[str, float]:
    """Milliseconds a step that each operation cannot be faster than."""

    def ms(num_bytes: float, flops: float = 0) -> float:
        return max(num_bytes / read_rate, flops / flop_rate) * 1e3

    out = {}
    for (n, k), name in WIDTHS.items():
        tokens = len(case.new_tokens) if name == "LM head" else sum(case.new_tokens)
        times = 1 if name == "LM head" else LAYERS
        out[name] = ms(times * n * k * number_bytes, times * 2 * n * k * tokens)
    rows = zip(case.new_tokens, case.contexts, strict=True)
    seen = sum(tokens * context - (tokens - 1) * tokens / 2 for tokens, context in rows)
    kv_bytes = LAYERS * sum(case.contexts) * 2 * KV_HEADS * HEAD_DIM * number_bytes
    out["attention"] = ms(kv_bytes, LAYERS * 4 * seen * HEADS * HEAD_DIM)
    return out


def rates(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes read a second, and floating point operations a second."""
    numbers = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    square = torch.randn(SIDE, SIDE).to(dtype)
    reading = min(_seconds(numbers.sum) for _ in range(5))
    taken = LinearWeight.take(square.clone())
    fast = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    of_torch = square if fast else square.float()  # else minutes
    products = (lambda: of_torch @ of_torch, lambda: linear(square, taken))
    computing = min(_seconds(product) for product in products for _ in range(5))
    return READ_BYTES / reading, 2 * SIDE**3 / computing


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Watch:
    """Adds up the time of operations, step by step."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def around(self, call: Callable[..., Any], name: str | None = None) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = call(*args, **kwargs)
            label = name or WIDTHS[tuple(args[1].shape)]
            self.spent[label] += time.perf_counter() - start
            return out

        return timed


def as_it_comes(steps: RecordedSteps, inputs: Any) -> Any:
    """In place of RecordedSteps.forward: every step through Python."""
    return steps._decoder.forward(inputs, steps._cache)


def run(llm: LLM, case: Case, repeat: int, play: bool, watch: Watch | None) -> None:
    """Answer prompts whose steps include the case's, and note those."""
    plain = Worker.run

    def noting(worker: Worker, plan: Any) -> Any:
        if watch is not None:
            watch.spent.clear()
        start = time.perf_counter()
        pending = plain(worker, plan)
        whole = (time.perf_counter() - start) * 1e3
        least = [c - 16 * (n == 1) for n, c in zip(case.new_tokens, case.contexts, strict=True)]
        contexts = sorted(worker.slots._context_len[plan.row_slots])
        reached = len(contexts) == len(least) and all(map(ge, contexts, sorted(least)))
        if sorted(plan.row_num_new_tokens) == case.new_tokens and reached:
            if watch is None:
                (case.played_ms if play else case.whole_ms).append(whole)
            else:
                for name, seconds in watch.spent.items():
                    case.ms[name].append(seconds * 1e3)
                case.else_ms.append(whole - sum(watch.spent.values()) * 1e3)
        return pending

    prompts = [
        {"prompt_token_ids": [1000 + (7919 * (i + 1) * (row + 1) + repeat) % 40000 for i in range(length)]}
        for row, length in enumerate(case.prompts)
    ]
    sampling = [
        SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        for count in case.max_tokens
    ]
    forward = RecordedSteps.forward if play else as_it_comes
    with mock.patch.object(Worker, "run", noting), mock.patch.object(RecordedSteps, "forward", forward):
        llm.generate(prompts, sampling)


def main() -> None:
    parser = record.parser("where_time_goes", __doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    result = record.describe("where_time_goes")
    torch.set_num_threads(arguments.threads)
    llm = LLM(
        "demo",
        dtype=arguments.dtype,
        device="cpu",
        threads_per_shard=arguments.threads,
        cache={"prefix_caching": False},
        scheduler={"max_num_seqs": 32, "max_num_batched_tokens": 1024, "max_model_len": 4096},
    )
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    watch = Watch()
    timed = {
        "norms": [(ops, "rms_norm"), (ops, "add_rms_norm")],
        "rotary and cache write": [(ops, "rotary_kv_write")],
        "attention": [(ops, "paged_attention")],
        "embedding": [(kvshard.parallel.embedding, "embedding")],
        "gate, up and activation": [(kvshard.parallel.linear, "gated_linear")],
        None: [(kvshard.parallel.linear, "linear"), (kvshard.parallel.embedding, "linear")],
    }
    measured = []
    for case in CASES:
        for repeat in range(arguments.repeats):
            measured.append(rates(dtype))
            run(llm, case, 3 * repeat, play=False, watch=None)
            run(llm, case, 3 * repeat + 1, play=True, watch=None)
            patches = [
                mock.patch.object(module, name, watch.around(getattr(module, name), label))
                for label, places in timed.items()
                for module, name in places
            ]
            for patch in patches:
                patch.start()
            run(llm, case, 3 * repeat + 2, play=False, watch=watch)
            for patch in patches:
                patch.stop()
    read_rate, flop_rate = (median(values) for values in zip(*measured, strict=True))
    lines = [
        "# Where the time of a step goes",
        "",
        f"SmolLM2-135M in {arguments.dtype}, one shard of {arguments.threads} threads, {result['date']}, {result['machine']['processor']}: reads "
        f"{read_rate / 1e9:.1f} GB/s, computes {flop_rate / 1e9:.0f} GFLOP/s. Milliseconds a step, medians.",
    ]
    for case in CASES:
        least = floors(case, dtype.itemsize, read_rate, flop_rate)
        lines += ["", f"**{case.name}**", "", "| | ms | floor |", "|---|---|---|"]
        spent = {name: median(values) for name, values in case.ms.items()}
        for name in sorted(spent, key=lambda name: -spent[name]):
            floor = f"{least[name]:.2f}" if name in least else ""
            lines.append(f"| {name} | {spent[name]:.2f} | {floor} |")
        lines.append(f"| all else: Python between them, inputs, sampler | {median(case.else_ms):.2f} | |")
        lines.append(
            f"| **the step, through Python** | {median(case.whole_ms):.2f} | {sum(least.values()):.2f} |"
        )
        lines.append(f"| **the step, played** | {median(case.played_ms):.2f} | {sum(least.values()):.2f} |")
    print("\n".join(lines))
    arguments.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    samples = [
        {
            "case": case.name,
            "ms": case.ms,
            "else_ms": case.else_ms,
            "whole_ms": case.whole_ms,
            "played_ms": case.played_ms,
        }
        for case in CASES
    ]
    record.write(
        result | {"read_gb_s": read_rate / 1e9, "gflop_s": flop_rate / 1e9, "samples": samples},
        arguments.output,
    )


if __name__ == "__main__":
    main()

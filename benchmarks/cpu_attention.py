"""Time of one layer's decode attention on the CPU, against torch's own on keys that already lie one behind the other.

Claim: reading the cache through its block table, in any format, costs no more than scaled_dot_product_attention on
contiguous keys and values, which is that function's best case and leaves out the copy that paging would need.

    python benchmarks/cpu_attention.py --rows 32 --context 1024 --threads 2

All variants take turns within an iteration, each on the next of several layers' caches, so that none finds its keys in
the processor's cache. A copy of as many bytes as the bfloat16 keys and values is timed in the same turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import record
import torch
import torch.nn.functional as F
from torch import Tensor

from kvshard.kernels import ops

Q_PER_KV, NUM_KV, HEAD_DIM, BLOCK_SIZE = 3, 3, 64, 16
NUM_LAYERS = 4
WARM_UP = 5
# Largest absolute errors against float32 attention: what normal keys and values leave of a format's steps, and half more.
BOUNDS: dict[ops.CacheFormat, float] = {"auto": 0.02, "int8": 0.02, "fp8": 0.05, "int4": 0.2}


def filled_layers(
    format: ops.CacheFormat, tables: Tensor, context: int, keys: list[Tensor]
) -> list[ops.KVLayer]:
    """A cache per layer that holds the layer's keys, also as values: [rows, NUM_KV, context, HEAD_DIM]."""
    rows, blocks = tables.shape
    slots = (tables.long()[:, :, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).view(rows, -1)[:, :context]
    layers = []
    for x in keys:
        layer = ops.KVLayer.empty(format, (rows * blocks + 1, NUM_KV, BLOCK_SIZE, HEAD_DIM), x.dtype, "cpu")
        flat = x.transpose(1, 2).reshape(-1, NUM_KV, HEAD_DIM)
        write(flat.clone(), flat, layer, slots.reshape(-1))
        layers.append(layer)
    return layers


def write(q: Tensor, kv: Tensor, layer: ops.KVLayer, slots: Tensor) -> None:
    """Every token at position 0, where rotary turns nothing."""
    no_turn = torch.zeros(1, HEAD_DIM)
    no_turn[:, : HEAD_DIM // 2] = 1
    ops.rotary_kv_write(q, kv, kv, no_turn, torch.zeros_like(slots), layer, slots)


def variants(rows: int, context: int) -> dict[str, Callable[[int], object]]:
    """What to time, by name; each takes the number of the layer."""
    generator = torch.Generator().manual_seed(0)
    blocks = -(-context // BLOCK_SIZE)
    tables = (torch.randperm(rows * blocks, generator=generator) + 1).view(rows, blocks).int()
    meta = ops.AttentionMetadata.build(
        np.ones(rows, np.int32), np.full(rows, context, np.int32), tables, BLOCK_SIZE, "cpu"
    )
    heads = ops.HeadLayout((Q_PER_KV,) * NUM_KV)
    shape = (rows, NUM_KV, context, HEAD_DIM)
    keys = [torch.randn(shape, generator=generator).bfloat16() for _ in range(NUM_LAYERS)]
    values = [x.clone() for x in keys]
    q = torch.randn(rows, NUM_KV * Q_PER_KV, HEAD_DIM, generator=generator).bfloat16()
    grouped = q.view(rows, NUM_KV, Q_PER_KV, HEAD_DIM)
    target = [torch.empty_like(keys[0]), torch.empty_like(keys[0])]
    expected = F.scaled_dot_product_attention(grouped.float(), keys[0].float(), values[0].float()).view(
        q.shape
    )

    def paged(layers: list[ops.KVLayer]) -> Callable[[int], object]:
        own = q.clone()  # as keys of this format want them: the op that writes int4 keys mixes both
        write(own, keys[0][:, :, 0].contiguous(), layers[0], torch.full((rows,), -1))
        return lambda i: ops.paged_attention(own, layers[i], meta, heads, HEAD_DIM**-0.5)

    out: dict[str, Callable[[int], object]] = {
        "copy of K and V": lambda i: (target[0].copy_(keys[i]), target[1].copy_(values[i])),
        "torch, contiguous": lambda i: F.scaled_dot_product_attention(grouped, keys[i], values[i]),
    }
    for format in BOUNDS:
        run = paged(filled_layers(format, tables, context, keys))
        error = (run(0).float() - expected).abs().max()
        assert error < BOUNDS[format], f"{format}: off by {error}"
        out["bfloat16" if format == "auto" else format] = run
    return out


def main() -> None:
    parser = record.parser("cpu_attention", __doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = record.describe("cpu_attention")
    run_by = variants(arguments.rows, arguments.context)
    samples: dict[str, list[float]] = {name: [] for name in run_by}
    for iteration in range(WARM_UP + arguments.iterations):
        for name, run in run_by.items():
            start = time.perf_counter_ns()
            run(iteration % NUM_LAYERS)
            samples[name].append(round((time.perf_counter_ns() - start) / 1000, 1))
    samples = {name: values[WARM_UP:] for name, values in samples.items()}
    # Ratios of neighbours in time: the machine's slow moments hit both.
    baseline = samples["torch, contiguous"]
    print(f"{arguments.rows} rows x {arguments.context} tokens, {arguments.threads} threads, one layer")
    print("| | median us | p10 - p90 | torch's time / this |\n|---|---|---|---|")
    for name, values in samples.items():
        ordered = sorted(values)
        spread = f"{ordered[len(values) // 10]:.0f} - {ordered[len(values) * 9 // 10]:.0f}"
        ratio = median(b / v for b, v in zip(baseline, values, strict=True))
        print(f"| {name} | {median(values):.0f} | {spread} | {ratio:.2f} |")
    result |= {
        "arguments": {k: v for k, v in vars(arguments).items() if k != "output"},
        "unit": "microseconds a call, by variant",
        "median": {name: median(values) for name, values in samples.items()},
        "samples": samples,
    }
    record.write(result, arguments.output)


if __name__ == "__main__":
    main()

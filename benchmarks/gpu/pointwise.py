"""Time of the ops between matrix products: RMSNorm, residual add + RMSNorm, SiLU * mul, rotary + cache write.

Claim: from some hundred tokens on, each moves the bytes that it must at 0.85 of the measured copy bandwidth or more.
At decode sizes a launch costs more than the bytes, so those rows are microseconds to compare.

    benchmarks/gpu/run.sh pointwise

Sizes are those of an 8B model (hidden 4096, MLP 14336, 32/8 heads of 128), bf16; rotary writes each cache format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness import Part, Run, check, copy_of, run_part, sets_for
from torch import Tensor

from kvshard.kernels import ops

FORMATS: tuple[ops.CacheFormat, ...] = ("auto", "int8", "fp8", "int4")
EPS = 1e-5
BLOCK_SIZE = 16


class Sizes(NamedTuple):
    hidden: int
    inner: int
    num_q: int
    num_kv: int
    head_dim: int
    tokens: tuple[int, ...]


def sizes(dry: bool) -> Sizes:
    return Sizes(64, 96, 4, 2, 16, (3, 20)) if dry else Sizes(4096, 14336, 32, 8, 128, (1, 32, 512, 8192))


def ops_of() -> dict[str, tuple[str, ...]]:
    """Variants by op; torch's own where there is one."""
    return {
        "rms_norm": ("copy", "kvshard", "torch"),
        "add_rms_norm": ("copy", "kvshard", "torch"),
        "silu_mul": ("copy", "kvshard", "torch"),
        "rotary_kv_write": ("copy", *(f"kvshard {format}" for format in FORMATS)),
    }


def rows(dry: bool) -> list[tuple[str, str]]:
    return [
        (f"{op}, {tokens} tokens", variant)
        for op, variants in ops_of().items()
        for tokens in sizes(dry).tokens
        for variant in variants
    ]


def normal(part: Part, *size: int) -> Tensor:
    return torch.randn(size, device=part.device, dtype=torch.bfloat16)


def checked(run: Run, expected: Callable[[], Tensor], bound: float = 0.01) -> Callable[[], Run]:
    def make() -> Run:
        result = run(0)
        assert isinstance(result, Tensor)
        check(result, expected(), bound)
        return run

    return make


def norms(part: Part, op: str, tokens: int) -> None:
    hidden = sizes(part.dry).hidden
    moved = tokens * hidden * 2.0 * (2 if op == "rms_norm" else 4) + hidden * 2
    count = sets_for(moved, part.dry)
    xs, residuals = ([normal(part, tokens, hidden) for _ in range(count)] for _ in "xr")
    weight = normal(part, hidden)

    def ours(i: int) -> Tensor:
        if op == "rms_norm":
            return ops.rms_norm(xs[i % count], weight, EPS)
        return ops.add_rms_norm(xs[i % count], residuals[i % count], weight, EPS)

    def theirs(i: int) -> Tensor:
        x = xs[i % count] if op == "rms_norm" else residuals[i % count].add_(xs[i % count])
        return F.rms_norm(x, (hidden,), weight, EPS)

    def expected() -> Tensor:
        """After the first call, which has already added x to the residual."""
        return F.rms_norm((xs if op == "rms_norm" else residuals)[0].float(), (hidden,), weight.float(), EPS)

    time_op(part, f"{op}, {tokens} tokens", ours, theirs, expected, moved)


def activation(part: Part, tokens: int) -> None:
    inner = sizes(part.dry).inner
    moved = tokens * inner * 2.0 * 3
    count = sets_for(moved, part.dry)
    xs = [normal(part, tokens, 2 * inner) for _ in range(count)]

    def theirs(i: int) -> Tensor:
        gate, up = xs[i % count].chunk(2, dim=1)
        return F.silu(gate) * up

    def expected() -> Tensor:
        gate, up = xs[0].float().chunk(2, dim=1)
        return F.silu(gate) * up

    time_op(
        part, f"silu_mul, {tokens} tokens", lambda i: ops.silu_mul(xs[i % count]), theirs, expected, moved
    )


def time_op(
    part: Part, case: str, ours: Run, theirs: Run, expected: Callable[[], Tensor], moved: float
) -> None:
    copy, copied = copy_of(part)
    makers = {"copy": copy, "kvshard": checked(ours, expected), "torch": checked(theirs, expected)}
    part.measure(
        case, makers, {"copy": copied, "kvshard": moved, "torch": moved}, repeat=repeats(part, moved)
    )
    aim(part, case, "kvshard", moved)


def rotary(part: Part, tokens: int) -> None:
    size = sizes(part.dry)
    case = f"rotary_kv_write, {tokens} tokens"
    heads = size.num_q + 2 * size.num_kv
    reads = tokens * (heads + size.num_q) * size.head_dim * 2.0 + tokens * size.head_dim * 4
    count = sets_for(reads, part.dry)
    steps = [normal(part, tokens, heads, size.head_dim) for _ in range(count)]
    angles = torch.randn(4096, size.head_dim // 2, device=part.device)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.randint(0, 4096, (tokens,), device=part.device)
    num_blocks = -(-tokens // BLOCK_SIZE) + 1
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device=part.device)[:tokens]

    def ours(format: ops.CacheFormat) -> Callable[[], Run]:
        def make() -> Run:
            shape = (num_blocks, size.num_kv, BLOCK_SIZE, size.head_dim)
            caches = [ops.KVLayer.empty(format, shape, torch.bfloat16, part.device) for _ in range(count)]

            def run(i: int) -> None:
                q, k, v = steps[i % count].split((size.num_q, size.num_kv, size.num_kv), dim=1)
                ops.rotary_kv_write(q, k, v, cos_sin, positions, caches[i % count], slots)

            before = steps[0][:, : size.num_q].float()
            run(0)
            got, expected = steps[0][:, : size.num_q], turned(before, cos_sin[positions])
            if format == "int4":  # mixed over channels, which keeps lengths
                got, expected = got.float().norm(dim=-1), expected.norm(dim=-1)
            check(got, expected, 0.01)
            return run

        return make

    copy, copied = copy_of(part)
    makers, amounts = {"copy": copy}, {"copy": copied}
    for format in FORMATS:
        width = {"auto": 2.0 * size.head_dim, "int4": size.head_dim / 2 + 2}.get(format, size.head_dim + 2.0)
        makers[f"kvshard {format}"] = ours(format)
        amounts[f"kvshard {format}"] = reads + 2 * tokens * size.num_kv * width
    part.measure(case, makers, amounts, repeat=repeats(part, reads))
    aim(part, case, "kvshard auto", reads)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """x [T, heads, D] in float32, turned by pairs (c, c + D / 2)."""
    cos, sin = angles[:, None].chunk(2, dim=2)
    a, b = x.chunk(2, dim=2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=2)


def repeats(part: Part, moved: float) -> int:
    """Calls in a sample, so that an event's resolution is a small part of it."""
    return 1 if part.dry else max(1, min(20, int((64 << 20) / moved)))


def aim(part: Part, case: str, variant: str, moved: float) -> None:
    """Only where the bytes outweigh a launch: some 8 MB take about as long as one, 2 to 3 microseconds."""
    if part.dry or moved > (8 << 20):
        part.target(f"share of copy bandwidth: {case}", 0.85, part.share(case, variant))


def body(part: Part) -> None:
    for tokens in sizes(part.dry).tokens:
        norms(part, "rms_norm", tokens)
        norms(part, "add_rms_norm", tokens)
        activation(part, tokens)
        rotary(part, tokens)


if __name__ == "__main__":
    run_part("pointwise", __doc__, rows, body)

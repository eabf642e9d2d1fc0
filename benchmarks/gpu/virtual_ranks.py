"""Time of the body of the fused all-reduce + residual + RMSNorm: all ranks as programs of one launch on one GPU.

Claim: 8 ranks x 8 rows x 4096 bf16 take at most 5 microseconds: barrier, sums and norm, without the links between
GPUs. A launch is in the figure, so the norm alone on as many rows is timed beside it.

    benchmarks/gpu/run.sh virtual_ranks

Interpreted, one program runs after another, and none can wait for a later one: the dry mode has one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from harness import NotHereError, Part, Run, check, run_part

from kvshard.kernels import ops

EPS = 1e-5
CLAIMED = (8, 8, 4096)
VARIANTS = ("add_rms_norm alone", "kvshard all-reduce body")


def shapes(dry: bool) -> list[tuple[int, int, int]]:
    """Ranks, rows, hidden size. Ranks x rows programs must be on the device together."""
    return [(1, 2, 64)] if dry else [(2, 8, 4096), (4, 8, 4096), (8, 1, 4096), (8, 8, 4096), (8, 8, 8192)]


def name_of(ranks: int, num_rows: int, hidden: int) -> str:
    return f"{ranks} ranks x {num_rows} rows x {hidden}"


def rows(dry: bool) -> list[tuple[str, str]]:
    return [(name_of(*shape), variant) for shape in shapes(dry) for variant in VARIANTS]


def all_ranks(part: Part, ranks: int, num_rows: int, hidden: int) -> Callable[[], Run]:
    def make() -> Run:
        try:
            import triton
            from virtual_ranks_kernel import virtual_ranks_kernel
        except ImportError as error:
            raise NotHereError(f"{error.name} is missing") from error
        from kvshard.kernels.tiles import row_tile

        if not part.dry:
            held = torch.cuda.get_device_properties(part.device).multi_processor_count
            assert ranks * num_rows <= held, (
                f"{ranks * num_rows} programs on {held} multiprocessors would hang"
            )
        size = (ranks, num_rows, hidden)
        x, residual = (torch.randn(size, device=part.device).bfloat16() for _ in "xr")
        residual[:] = residual[0]  # the residual stream is the same on all ranks
        first = residual[0].float() + x.float().sum(0)
        weight = torch.ones(hidden, device=part.device, dtype=torch.bfloat16)
        out = torch.empty_like(x)
        buffers = {
            "data": torch.zeros(ranks, 2, num_rows, hidden, dtype=torch.bfloat16, device=part.device),
            "signals": torch.zeros(ranks, num_rows, ranks, dtype=torch.int64, device=part.device),
            "sequence": torch.zeros(ranks, num_rows, dtype=torch.int64, device=part.device),
        }
        for name in ("data", "signals"):
            addresses = [buffers[name][rank].data_ptr() for rank in range(ranks)]
            buffers[f"{name}_table"] = torch.tensor(addresses, dtype=torch.int64, device=part.device)
        block, warps = row_tile(hidden)

        def run(_: int) -> None:
            virtual_ranks_kernel[(num_rows, ranks)](
                x,
                residual,
                weight,
                out,
                buffers["data_table"],  # and with it what it points to lives as long as this function
                buffers["signals"],
                buffers["signals_table"],
                buffers["sequence"],
                num_rows,
                hidden,
                EPS,
                WORLD_SIZE=ranks,
                PEERS=triton.next_power_of_2(ranks),
                BLOCK=block,
                num_warps=warps,
            )

        run(0)
        check(residual[0], first, 0.01)
        check(out[0], first / (first.square().mean(1, keepdim=True) + EPS).sqrt(), 0.02)
        assert bool((out == out[:1]).all()), "ranks differ"
        return run

    return make


def norm_alone(part: Part, ranks: int, num_rows: int, hidden: int) -> Callable[[], Run]:
    def make() -> Run:
        x, residual = (torch.randn(ranks * num_rows, hidden, device=part.device).bfloat16() for _ in "xr")
        weight = torch.ones(hidden, device=part.device, dtype=torch.bfloat16)
        return lambda _: ops.add_rms_norm(x, residual, weight, EPS)

    return make


def body(part: Part) -> None:
    for shape in shapes(part.dry):
        case = name_of(*shape)
        makers = dict(zip(VARIANTS, (norm_alone(part, *shape), all_ranks(part, *shape)), strict=True))
        ranks, num_rows, hidden = shape
        # Every rank writes its row once, and reads those of all ranks, its residual and writes that and the output.
        moved = ranks * num_rows * hidden * 2.0
        amounts = dict(zip(VARIANTS, (4 * moved, (ranks + 5) * moved), strict=True))
        part.measure(case, makers, amounts, repeat=1 if part.dry else 20)
        if shape == CLAIMED:
            samples = part.rows[case, VARIANTS[1]].samples_us
            part.target(f"microseconds: {case}", 5.0, median(samples) if samples else None, at_least=False)


if __name__ == "__main__":
    run_part("virtual_ranks", __doc__, rows, body)

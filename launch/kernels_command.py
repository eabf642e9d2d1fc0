"""`kvshard kernels`: what the compilers make of the GPU kernels, for GPUs that need not be here."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..kernels.compiled.report import GATED, TARGETS, CompilerMissing, KernelReport, compile_kernels
from ..runtime.errors import ConfigError


def kernels(
    targets: Annotated[
        list[str],
        typer.Option("--target", metavar="NAME", help=f"One of {', '.join(TARGETS)}; may be given again."),
    ] = list(GATED),  # noqa: B006 - typer copies it
    only: Annotated[
        str,
        typer.Option(metavar="NAME", help="Only kernels of calls with NAME in their name, as `prefill 128`."),
    ] = "",
) -> None:
    """Compile every GPU kernel and show what it costs. No GPU is needed; all of them take about a minute.

    The columns: registers a thread, bytes spilled to memory a thread, bytes of shared memory a block and their share
    of the GPU's limit, and tensor-core instructions and loads of 16 bytes in the program text.

    Exit codes: 0 all are well made, 1 some spill registers, need too much shared memory or lack an
    instruction, 2 there is no compiler.
    """
    targets = list(dict.fromkeys(targets))
    for target in targets:
        if target not in TARGETS:
            raise ConfigError(f"--target {target}: expected one of {', '.join(TARGETS)}")
    with (
        tempfile.TemporaryDirectory() as folder,
        Console(stderr=True).status(f"compiling for {', '.join(targets)}"),
    ):
        try:
            reports = compile_kernels(Path(folder), targets, only)
        except CompilerMissing as error:
            raise ConfigError(str(error)) from error
        except ValueError as error:
            raise ConfigError(f"--only {only}: {error}") from error
    console = Console()
    for target in targets:
        console.print(_table(target, [report for report in reports if report.target == target]))
    faulty = [report for report in reports if report.faults]
    if faulty:
        first = faulty[0]
        console.print(
            f"{len(faulty)} of {len(reports)} kernels are faulty, first {first.kernel or 'a kernel'} of "
            f"{first.call} on {first.target}: {'; '.join(first.faults)}",
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(1)


def _table(target: str, reports: Sequence[KernelReport]) -> Table:
    limit = TARGETS[target].shared_limit
    table = Table(
        title=f"{target}, {limit:,} bytes of shared memory a block",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    table.add_column("kernel")
    for header in ("regs", "spill", "shared", "of\nlimit", "tensor\ncore", "16 B\nloads"):
        table.add_column(header, justify="right", no_wrap=True)
    for report in reports:
        kernel = report.kernel.removesuffix("_kernel")
        table.add_row(
            report.call if report.call.startswith(kernel) else f"{report.call}: {kernel}",
            str(report.registers),
            str(report.spilled),
            f"{report.shared:,}",
            f"{report.shared / limit:.0%}",
            str(report.tensor_core),
            str(report.wide_loads),
            style="red" if report.faults else None,
        )
    return table

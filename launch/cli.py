"""The `kvshard` command."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..runtime.config import JobConfig, load_config, parse_overrides
from ..runtime.errors import ConfigError
from .bench import app as bench_app
from .kernels_command import kernels
from .plan_command import plan
from .run import execute_job, is_done, report_errors


class _Commands(TyperGroup):
    """Tells the errors of any command the same way."""

    def invoke(self, ctx: Any) -> Any:
        def action() -> int:
            super(_Commands, self).invoke(ctx)
            return 0

        if code := report_errors(action):
            raise typer.Exit(code)


app = typer.Typer(
    name="kvshard",
    cls=_Commands,
    help="Tensor-parallel batch generation, sharded by attention heads.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="Job file; see configs/ for examples.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the job file; may be given again."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvshard {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@app.command(no_args_is_help=True)
def run(
    job: JobFile,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N rows of the input.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run rows again that failed in an earlier run.")
    ] = False,
    # Given by start_torchrun to the workers it starts, since torchrun turns every failure into a 1.
    report_exit_code: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run a batch job; the same command again goes on where it stopped.

    Rows whose results are in the output file are skipped, so a job that was interrupted or lost a
    shard is continued by repeating its command.

    Examples:

        kvshard run configs/quickstart.yaml

        kvshard run job.yaml --limit 8 --set output.path=try.jsonl

        kvshard run job.yaml --set launcher=ray --set tensor_parallel_size=8

    Exit codes: 0 all rows answered, 1 some rows failed (their output lines say why), 2 the job could not
    run or was lost, 130 interrupted.
    """
    config = _load(job, overrides)
    if "TORCHELASTIC_RUN_ID" in os.environ and config.launcher != "torchrun":
        if config.launcher == "ray":
            raise ConfigError(
                "launcher=ray, but torchrun started this process; set launcher: torchrun, or start kvshard "
                "without torchrun"
            )
        config = config.model_copy(update={"launcher": "torchrun"})  # a size needs no launcher in the file
    if config.launcher == "torchrun":
        raise typer.Exit(_run_with_torchrun(config, job, overrides, limit, retry_failed, report_exit_code))
    raise typer.Exit(execute_job(config, limit, retry_failed))


def _run_with_torchrun(
    config: JobConfig,
    job: Path,
    overrides: list[str],
    limit: int | None,
    retry_failed: bool,
    report_exit_code: Path | None,
) -> int:
    from .torchrun import inside_torchrun, join_torchrun, start_torchrun

    if inside_torchrun():
        return join_torchrun(config, {"limit": limit, "retry_failed": retry_failed}, report_exit_code)
    if is_done(config, limit, retry_failed):
        return 0
    arguments = [str(job), *(word for pair in overrides for word in ("--set", pair))]
    arguments += [] if limit is None else ["--limit", str(limit)]
    arguments += ["--retry-failed"] if retry_failed else []
    return start_torchrun(config, arguments)


def _load(job: Path, overrides: list[str]) -> JobConfig:
    # Absolute, so that the settings saved beside the output do not depend on the folder one starts from.
    return load_config(job.absolute(), parse_overrides(overrides))


app.command(no_args_is_help=True)(plan)
app.command()(kernels)
app.add_typer(bench_app, name="bench")


@app.command("fetch-demo")
def fetch_demo() -> None:
    """Download the demo model (about 93 MB) if it is not in the cache yet."""
    from ..runtime.models.resolve import fetch_demo as fetch

    typer.echo(f"The demo model is in {fetch()}")


def main() -> None:
    """Entry point of the `kvshard` script."""
    try:
        app()
    except Exception:  # noqa: BLE001 - a bug of ours; 1 would mean that rows failed
        traceback.print_exc()
        sys.exit(2)

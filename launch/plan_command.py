"""`kvshard plan`: what every shard would hold and whether it fits, from the job file and headers alone."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..runtime.config import JobConfig, load_config, parse_overrides
from ..runtime.errors import ConfigError
from ..runtime.models.checkpoint_index import read_index
from ..runtime.models.families import spec_from_config
from ..runtime.models.fields import Fields
from ..runtime.models.resolve import resolve_model
from ..runtime.models.spec import ModelSpec
from ..runtime.models.weight_formats import WeightFormats
from ..runtime.observe.host import host_memory_bytes
from ..runtime.observe.memory_plan import (
    DeviceKind,
    MemoryPlan,
    build_shard_map,
    memory_fraction,
    plan_memory,
)
from .run import EXIT_JOB_ERROR

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for base, suffix in ((1000, "b"), (1024, "ib"))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def plan(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="Job file; see configs/ for examples.")],
    device_memory: Annotated[
        str | None,
        typer.Option(
            help="Plan for devices that are not here: bytes of each, as 80GiB, or one a shard, as 80GiB,40GiB. "
            "Means GPUs unless the job says device: cpu, where it is each shard's share of the host."
        ),
    ] = None,
    overrides: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a setting of the job file; may be given again."
        ),
    ] = [],  # noqa: B006 - typer copies it
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what each shard would hold, without reading weights.

    Exit codes: 0 it fits, 2 it does not fit or cannot run; the message names the setting to change.
    """
    config = load_config(job.absolute(), parse_overrides(overrides))
    memory = None if device_memory is None else parse_sizes(device_memory)
    spec, formats = read_model(config)
    shard_map = build_shard_map(config, spec)
    device_kind = _device_kind(config, planned=memory is not None)
    if memory is None:
        memory = _memory_here(device_kind, config.tensor_parallel_size)
    elif len(memory) == 1:
        memory *= config.tensor_parallel_size
    result = plan_memory(config, spec, shard_map, device_kind, memory, formats)
    if as_json:
        typer.echo(json.dumps(result.as_dict() | {"model": config.model}, indent=2))
    else:
        _print(Console(), config, result)
    if result.problem is not None:
        raise typer.Exit(EXIT_JOB_ERROR)


def parse_sizes(text: str) -> list[int]:
    """`80GiB` or `80GiB,40GiB` to bytes; GB is 1000**3 and GiB 1024**3. Raises ConfigError."""
    sizes = []
    for part in text.split(","):
        match = _SIZE.fullmatch(part.strip())
        unit = match and _UNITS.get(match[2].lower())
        if match is None or unit is None or not float(match[1]):
            raise ConfigError(
                f"--device-memory {text}: write a size like 80GiB, or one a shard like 80GiB,40GiB"
            )
        sizes.append(int(float(match[1]) * unit))
    return sizes


def read_model(config: JobConfig) -> tuple[ModelSpec, WeightFormats]:
    """The model's sizes and how its matrices are kept. Of a hub model only config.json is fetched.

    Raises CheckpointError or ConfigError.
    """
    model = config.model
    is_hub_id = (
        model.count("/") == 1 and not model.startswith((".", "~", "/")) and not model.endswith(".gguf")
    )
    if not is_hub_id or Path(model).is_dir():
        index = read_index(resolve_model(model, config.revision))
        return index.spec, index.weight_formats(config.quantization)
    if config.quantization == "keep":
        raise ConfigError(
            f"quantization: keep is for GGUF files, and model={model} is none; use int8, int4 or none"
        )
    from huggingface_hub import hf_hub_download  # 0.5 s to import, and only hub ids need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        path = Path(hf_hub_download(model, "config.json", revision=config.revision))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model={model}: config.json could not be fetched from the hub: {reason}"
        ) from error
    fields = Fields(str(path), json.loads(path.read_text(encoding="utf-8")))
    return spec_from_config(fields, Fields("", {})), WeightFormats(config.quantization)


def _device_kind(config: JobConfig, planned: bool) -> DeviceKind:
    if config.device != "auto":
        return config.device
    if planned:
        return "cuda"
    return "cuda" if len(_gpu_memory()) >= config.tensor_parallel_size else "cpu"


def _memory_here(device_kind: DeviceKind, world_size: int) -> list[int]:
    """What each rank may count on when all shards run on this host."""
    if device_kind == "cpu":
        return [host_memory_bytes() // world_size] * world_size
    gpus = _gpu_memory()
    if not gpus:
        raise ConfigError(
            "device=cuda and there is no GPU here: say what to plan for with --device-memory 80GiB"
        )
    device_of = [rank % len(gpus) for rank in range(world_size)]
    num_ranks = Counter(device_of)
    return [gpus[device] // num_ranks[device] for device in device_of]


def _gpu_memory() -> list[int]:
    import torch  # takes a second, and most plans are for other machines

    return [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]


def _print(console: Console, config: JobConfig, result: MemoryPlan) -> None:
    def mib(num_bytes: int | None) -> str:
        return "?" if num_bytes is None else f"{num_bytes / 2**20:,.0f}"

    table = Table(
        title=f"{os.path.basename(config.model)} on {len(result.shards)} x {result.device_kind}, MiB",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    headers = (
        "shard",
        "query\nheads",
        "KV\nheads",
        "weights",
        "KV\ncache",
        "reserve",
        "total",
        "may\nuse",
        "KV bytes\na token",
    )
    for header in headers:
        table.add_column(header, justify="right")
    for shard in result.shards:
        table.add_row(
            str(shard.rank),
            str(shard.num_q_heads),
            str(shard.num_kv_heads),
            mib(shard.weight_bytes),
            mib(shard.kv_bytes),
            mib(shard.reserve_bytes),
            mib(shard.total_bytes),
            mib(shard.usable_bytes),
            f"{shard.kv_bytes_per_token:,}",
        )
    console.print(table)
    fraction = memory_fraction(config.cache, result.device_kind)
    kept = "" if result.quantization == "none" else f" (quantization: {result.quantization})"
    console.print(
        f"dtype: {result.dtype}{kept}, cache {result.cache_dtype}; cache.memory_fraction {fraction:g}"
    )
    console.print(
        f"cache: {result.num_blocks:,} blocks of {result.block_size} tokens, {result.num_tokens:,} tokens; "
        f"longest request {result.longest_request:,} of {result.max_model_len:,} tokens"
    )
    if len(result.groups) > 1 or result.groups[0].window is not None:
        for group in result.groups:
            seen = "all tokens" if group.window is None else f"{group.window:,} tokens"
            console.print(f"  {group.num_layers} layer(s) that see {seen}: {group.num_blocks:,} blocks")
    if result.problem is None:
        console.print("[green]fits[/green]")
    else:
        console.print("[red]does not fit:[/red] ", end="")
        console.print(result.problem, markup=False, highlight=False, soft_wrap=True)

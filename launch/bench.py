"""`kvshard bench`: measurements that anyone can repeat on their own machine."""

import importlib.util
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..runtime.config import JobConfig, parse_config
from ..runtime.errors import ConfigError
from ..runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from .engine import Engine

app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)


@dataclass(frozen=True)
class CacheSample:
    """One answer of `num_tokens` tokens to a prompt of one token."""

    cache_enabled: bool
    num_tokens: int
    num_token_steps: int  # tokens run through the model, counted by the coordinator
    wall_s: float
    kept_kv_bytes: int  # K and V kept from step to step, on all shards
    token_ids: tuple[int, ...]

    @property
    def ms_per_token(self) -> float:
        return self.wall_s * 1e3 / self.num_tokens


@app.callback()
def _group() -> None:
    pass


@app.command("cache")
def cache_command(
    model: Annotated[
        str, typer.Option(help="demo, a Hugging Face id, a directory or a .gguf file.")
    ] = "demo",
    lengths: Annotated[str, typer.Option(help="Answer lengths to run, in tokens.")] = "25,50,100,200",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; the fastest counts.")] = 2,
    output: Annotated[Path, typer.Option(help="Folder for cache.png and cache.json.")] = Path(
        "outputs/bench"
    ),
) -> None:
    """What the KV cache is worth: the same answers with it and without, over growing lengths.

    With the cache each token goes through the model once. Without it every step runs the whole sequence
    again: 5,050 token-steps instead of 100 for 100 tokens.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the plot needs matplotlib: pip install 'kvshard[plot]'")
    counts = parse_lengths(lengths)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}") from None
    console = Console()
    samples = measure(model, counts, repeats, True, console) + measure(model, counts, repeats, False, console)
    print_table(console, samples)
    machine = _machine()
    raw = {"machine": machine, "model": model, "samples": [asdict(sample) for sample in samples]}
    (output / "cache.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    plot(samples, output / "cache.png", f"{model}, {machine['device']}")
    console.print(f"Plot: {output / 'cache.png'}; raw values: {output / 'cache.json'}", soft_wrap=True)


def parse_lengths(text: str) -> list[int]:
    """`25,50` to sorted counts of at least 1. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--lengths {text}: write token counts like 25,50,100")
    return sorted({int(part) for part in parts})


def measure(
    model: str, lengths: Sequence[int], repeats: int, cache_enabled: bool, console: Console
) -> list[CacheSample]:
    """Greedy answers of exactly these lengths, one at a time, on one shard; the fastest of `repeats` runs of each."""
    from .engine import Engine  # late: torch and transformers take seconds to import

    with Engine.start(_config(model, max(lengths), cache_enabled)) as engine:
        _answer(engine, min(lengths))  # warms up
        samples = []
        for length in lengths:
            runs = [_answer(engine, length) for _ in range(repeats)]
            samples.append(min(runs, key=lambda sample: sample.wall_s))
            console.print(
                f"cache {'on' if cache_enabled else 'off'}: {length} tokens in {samples[-1].wall_s:.2f} s",
                highlight=False,
            )
    return samples


def _answer(engine: "Engine", length: int) -> CacheSample:
    """One answer of `length` tokens to a prompt of one token. Lengths must not shrink from call to call."""
    coordinator, cache_enabled = engine.coordinator, engine.config.cache.enabled
    sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
    request = engine.make_request("bench", [engine.spec.bos_token_id or 0], sampling)
    token_steps, started = coordinator.stats.num_token_steps, time.perf_counter()
    coordinator.add(request)
    while coordinator.has_work:
        coordinator.step()
    kv_bytes = sum(shard.kv_bytes for shard in engine.plan.shards)
    peak_used, num_all = coordinator.stats.peak_used_layer_blocks, coordinator.limits.num_layer_blocks
    return CacheSample(
        cache_enabled=cache_enabled,
        num_tokens=len(request.output_token_ids),
        num_token_steps=coordinator.stats.num_token_steps - token_steps,
        wall_s=time.perf_counter() - started,
        # As lengths grow, the peak is this answer's. Without the cache its blocks are only work space.
        kept_kv_bytes=kv_bytes * peak_used // num_all if cache_enabled else 0,
        token_ids=tuple(request.output_token_ids),
    )


def _config(model: str, longest: int, cache_enabled: bool) -> JobConfig:
    limit = longest + 1  # the prompt is one token
    values = {
        "model": model,
        "cache": {"enabled": cache_enabled},
        "scheduler": {"max_num_seqs": 1, "max_num_batched_tokens": limit, "max_model_len": limit},
    }
    return parse_config(values, "bench cache")


def print_table(console: Console, samples: Sequence[CacheSample]) -> None:
    """One row a length, both ways side by side."""
    with_cache = [sample for sample in samples if sample.cache_enabled]
    without = [sample for sample in samples if not sample.cache_enabled]
    table = Table(title="With and without the KV cache", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("tokens", justify="right")
    for quantity in ("token-steps", "ms a token", "MiB kept"):
        table.add_column(f"{quantity}\nwith", justify="right")
        table.add_column("\nwithout", justify="right")
    table.add_column("same\nanswer")
    for on, off in zip(with_cache, without, strict=True):
        table.add_row(
            f"{on.num_tokens:,}",
            f"{on.num_token_steps:,}",
            f"{off.num_token_steps:,}",
            f"{on.ms_per_token:.2f}",
            f"{off.ms_per_token:.2f}",
            f"{on.kept_kv_bytes / 2**20:.1f}",
            f"{off.kept_kv_bytes / 2**20:.1f}",
            "yes" if on.token_ids == off.token_ids else "no",
        )
    console.print(table)


def plot(samples: Sequence[CacheSample], path: Path, title: str) -> None:
    """Three panels over the answer's length: token-steps, time per token, bytes kept. Written as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(1, 3)
    for enabled, color, label in ((True, "tab:blue", "with cache"), (False, "tab:red", "without cache")):
        own = [sample for sample in samples if sample.cache_enabled is enabled]
        lengths = [sample.num_tokens for sample in own]
        values: list[list[float]] = [
            [sample.num_token_steps for sample in own],
            [sample.ms_per_token for sample in own],
            [sample.kept_kv_bytes / 2**20 for sample in own],
        ]
        for panel, series in zip(panels, values, strict=True):
            panel.plot(lengths, series, marker="o", color=color, label=label)
            panel.annotate(
                f"{series[-1]:,.0f}" if panel is panels[0] else f"{series[-1]:,.1f}",
                (lengths[-1], series[-1]),
                textcoords="offset points",
                xytext=(-4, 6),
                ha="right",
                color=color,
            )
    for panel, label in zip(
        panels, ("token-steps of one answer", "ms per token", "K and V kept, MiB"), strict=True
    ):
        panel.set_xlabel("tokens of the answer")
        panel.set_title(label)
        panel.margins(y=0.15)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].legend(loc="upper left")
    figure.savefig(path, dpi=120)


def _machine() -> dict[str, str]:
    import torch

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }

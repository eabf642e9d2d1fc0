"""The job file: one frozen model, every key checked before anything starts.

Unknown keys are refused with the nearest valid name, since a misspelt setting that is
silently dropped is a wrong run.
"""

import difflib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import ConfigError
from .models.weight_formats import Quantization
from .sampling_params import SamplingParams
from .yaml_text import read_yaml

Task = Literal["generate", "score"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CacheConfig(_Section):
    """The KV cache."""

    dtype: Literal["auto", "int8", "fp8", "int4"] = Field(
        "auto",
        description="element type of K and V; auto: the model's dtype; the others take 1, 1 and 1/2 bytes a channel and "
        "2 bytes of scale for each key and value of a head",
    )
    block_size: int = Field(16, ge=1, le=256, description="tokens a block")
    num_blocks: int | None = Field(
        None, ge=2, description="blocks of the cache; null: as many as memory_fraction allows"
    )
    memory_fraction: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="share of a device's memory for weights, cache and work space; null: 0.9 on CUDA, 0.5 of the host's on CPU",
    )
    enabled: bool = Field(
        True, description="false recomputes the whole sequence every step (to see what the cache is worth)"
    )
    prefix_caching: bool = Field(
        True,
        description="compute a beginning that prompts share once, and keep it while there is room; off when enabled is false; samples of one row (n) share theirs also when it is off",
    )


class SchedulerConfig(_Section):
    """What may run together."""

    max_num_seqs: int = Field(64, ge=1, description="requests that run at the same time")
    max_num_batched_tokens: int = Field(
        1024, ge=1, description="new tokens of one step, prompt chunks and decodes together"
    )
    max_model_len: int | None = Field(
        None, ge=1, description="most tokens of one request, prompt and output; null: the model's own limit"
    )
    run_ahead: int = Field(
        1, ge=0, le=8, description="plans sent before the result of an earlier one is back"
    )

    @model_validator(mode="after")
    def _every_row_fits(self) -> "SchedulerConfig":
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs={self.max_num_seqs}, "
                "so not every running request could decode in one step; raise the first or lower the second"
            )
        return self


class InputConfig(_Section):
    """Where the requests are."""

    path: str = Field(description="JSONL file or glob, .gz allowed; relative to the job file")
    format: Literal["auto", "openai", "plain"] = Field(
        "auto",
        description="openai: batch lines with custom_id and body; plain: id, prompt or messages, sampling fields",
    )


class OutputConfig(_Section):
    """Where the results go."""

    path: str = Field(description="JSONL file, appended to as rows finish; relative to the job file")


class TimeoutsConfig(_Section):
    """How long to wait before calling something lost, in seconds."""

    place_s: float = Field(120.0, gt=0, le=1_000_000, description="until Ray has placed every shard")
    start_s: float = Field(
        600.0, gt=0, le=1_000_000, description="until every shard has its weights and cache"
    )
    step_s: float = Field(300.0, gt=0, le=1_000_000, description="one step, and each collective in it")
    close_s: float = Field(10.0, gt=0, le=1_000_000, description="for shards to stop by themselves")


class RayConfig(_Section):
    """Only read when launcher is ray."""

    address: str | None = Field(
        None,
        description="cluster to join (auto, or host:port); null: RAY_ADDRESS if set, else one on this host",
    )


class NetworkConfig(_Section):
    """Only needed when shards are on several hosts."""

    interface: str | None = Field(
        None,
        description="network interface of the control channel, like eth0; null: the one that reaches the other hosts",
    )


class JobConfig(_Section):
    """One batch job."""

    task: Task = Field(
        "generate",
        description="score: how likely each row's text is, token by token, and its perplexity; nothing is generated",
    )
    model: str = Field(description="Hugging Face id, local directory, .gguf file, or demo")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    tokenizer: str | None = Field(None, description="directory or id of another tokenizer; null: the model's")
    chat_template: str | None = Field(
        None, description="file with a Jinja chat template; null: the tokenizer's"
    )
    tensor_parallel_size: int = Field(1, ge=1, description="number of shards, 1 to the model's query heads")
    shard_weights: tuple[float, ...] | None = Field(
        None, description="relative share of the work of each shard; null: equal"
    )
    threads_per_shard: int | None = Field(
        None,
        ge=1,
        description="CPU threads a shard; null: cores of its host or container / shards there, at least 1",
    )
    launcher: Literal["local", "ray", "torchrun"] = Field("local", description="what starts the shards")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda when every shard can have a GPU"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of weights and activations; auto: bfloat16 on cuda, float32 on cpu"
    )
    quantization: Quantization = Field(
        "none",
        description="weight matrices in memory; none: dtype; int8, int4: codes of 8 or 4 bits, made when they are loaded, "
        "and a scale for each 32 channels (int4: 8 bits in the embedding and LM head); keep: the Q8_0, Q4_0 and Q4_1 blocks "
        "of a GGUF file as they are",
    )
    cuda_graphs: bool = Field(True, description="one shard on a GPU: replay steps without prompts")
    seed: int = Field(0, ge=0, lt=2**63, description="for rows that bring no seed of their own")
    cache: CacheConfig = Field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    sampling: SamplingParams = Field(default_factory=SamplingParams, description="defaults of every row")
    input: InputConfig | None = None
    output: OutputConfig | None = None
    timeouts: TimeoutsConfig = Field(default_factory=TimeoutsConfig)
    ray: RayConfig = Field(default_factory=RayConfig)
    network: NetworkConfig = Field(default_factory=NetworkConfig)

    @field_validator("shard_weights")
    @classmethod
    def _positive(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and not all(weight > 0 for weight in value):
            raise ValueError(f"every weight must be more than 0, not {list(value)}")
        return value

    @model_validator(mode="after")
    def _one_weight_a_shard(self) -> "JobConfig":
        if self.shard_weights is not None and len(self.shard_weights) != self.tensor_parallel_size:
            raise ValueError(
                f"shard_weights has {len(self.shard_weights)} entries and tensor_parallel_size={self.tensor_parallel_size}; "
                "give one weight a shard"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_the_task(self) -> "JobConfig":
        refused = self.sampling.only_to_generate if self.task == "score" else {}
        for name, value in refused.items():
            raise ValueError(f"sampling.{name}={value!r} has no meaning with task: score; leave it out")
        return self


def parse_config(values: Mapping[str, Any], source: str) -> JobConfig:
    """Check `values` (as read from YAML); `source` names them in errors. Raises ConfigError."""
    try:
        return JobConfig.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(problem, source) for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def load_config(path: Path, overrides: Mapping[str, Any] | None = None) -> JobConfig:
    """Read a job file. `overrides` are dotted keys, as in {"scheduler.run_ahead": 0}.

    Relative input, output, model, tokenizer and template paths are taken from the job file's folder.
    """
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the job file {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings as `key: value`, not {type(values).__name__}")
    for dotted, value in (overrides or {}).items():
        _set(values, dotted, value)
    return _resolve_paths(parse_config(values, str(path)), path.parent)


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`key.sub=value` strings to a dict; values are read as YAML. Raises ConfigError."""
    overrides = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {pair}: write key.sub=value")
        try:
            overrides[key.strip()] = read_yaml(text)
        except ValueError as error:
            raise ConfigError(f"--set {pair}: {error}") from None
    return overrides


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *groups, last = dotted.split(".")
    for group in groups:
        inner = values.setdefault(group, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {dotted}: {group} is a value, not a group of settings")
        values = inner
    values[last] = value


def _resolve_paths(config: JobConfig, folder: Path) -> JobConfig:
    def local(value: str) -> str:
        return os.path.normpath(folder / Path(value).expanduser())

    changed: dict[str, Any] = {}
    if config.input is not None:
        changed["input"] = config.input.model_copy(update={"path": local(config.input.path)})
    if config.output is not None:
        changed["output"] = config.output.model_copy(update={"path": local(config.output.path)})
    if config.chat_template is not None:
        changed["chat_template"] = local(config.chat_template)
    for key in ("model", "tokenizer"):
        value = getattr(config, key)
        # A hub id looks like a relative path: only what exists beside the job file, or says it is a path, is one.
        if value and (value.startswith((".", "~")) or value.endswith(".gguf") or (folder / value).is_dir()):
            changed[key] = local(value)
    return config.model_copy(update=changed)


def _explain(problem: Any, source: str) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = dict(_known_keys(JobConfig))
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [
            name for name in known if name.rsplit(".", 1)[-1] == location[-1]
        ]
        section = key.rpartition(".")[0]
        valid = sorted(name for name in known if name.rpartition(".")[0] == section)
        hint = f"did you mean {near[0]}?" if near else f"valid keys here: {', '.join(valid)}"
        return f"{source}: unknown key {key}; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("model_type", "model_attributes_type"):
        inner = [name for name, _ in _known_keys(JobConfig) if name.startswith(f"{key}.")]
        return f"{source}: {key}={problem['input']!r}: it is a group of settings: {', '.join(inner)}"
    if problem["type"] == "missing":
        return f"{source}: {key} is missing"
    if not location:
        return f"{source}: {message}"
    if problem["type"] == "value_error":
        return f"{source}: {key}: {message}"
    return f"{source}: {key}={problem['input']!r}: {message}"


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every settable key with its description."""
    for name, field in model.model_fields.items():
        yield prefix + name, field.description or ""
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _known_keys(inner, f"{prefix}{name}.")


def config_hash(config: JobConfig) -> str:
    """Equal for equal settings: shards must agree with the coordinator on every one."""
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16]

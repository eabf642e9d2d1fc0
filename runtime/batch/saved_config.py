"""The resolved config beside an output file, and whether a later run may add to that file."""

import os
from pathlib import Path
from typing import Any

import yaml

from ..config import JobConfig
from ..errors import ConfigError
from ..sampling_params import SamplingParams

# Settings that change what the answers are. The others change how fast and where they are made, and with that rounding.
_RESULT_KEYS = (
    "task",
    "model",
    "revision",
    "tokenizer",
    "chat_template",
    "dtype",
    "quantization",
    "cache.dtype",
    "seed",
    *(f"sampling.{name}" for name in SamplingParams.model_fields),
)
# "auto" before the shards are started, a value after: compared only once it is known.
_AUTO_KEYS = ("dtype",)


def save_config(path: Path, config: JobConfig) -> None:
    """Write `config` as a job file, atomically. Raises ConfigError when it cannot be written."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    temporary = path.with_name(path.name + ".new")
    try:
        heading = "# The resolved settings of the run that wrote the file beside this one.\n"
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(heading + text)
            stream.flush()
            os.fsync(stream.fileno())  # or a power cut may leave an empty file of this name beside rows
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def check_same_results(output: Path, saved: Path, config: JobConfig) -> None:
    """Raise ConfigError when the rows in `output` were made with settings that give other answers."""
    try:
        old = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return  # the user took it away
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {saved}, the settings of the rows in {output}: {error}") from None
    if not isinstance(old, dict):
        raise ConfigError(
            f"{saved}, the settings of the rows in {output}, holds none; set another output.path"
        )
    new, defaults = config.model_dump(mode="json"), JobConfig(model=config.model).model_dump(mode="json")
    for key in _RESULT_KEYS:
        before, now = _get(old, key, _get(defaults, key)), _get(new, key)
        if before == now or (key in _AUTO_KEYS and now == "auto"):
            continue
        raise ConfigError(
            f"{key}: the rows in {output} were made with {before!r} and the job says {now!r}, so they would not "
            f"belong together; set another output.path, or remove {output} to begin again"
        )


def _get(values: Any, dotted: str, default: Any = None) -> Any:
    """A setting of nested groups; `default` where the file does not have it, as when it is older than the setting."""
    for part in dotted.split("."):
        if not isinstance(values, dict) or part not in values:
            return default
        values = values[part]
    return values

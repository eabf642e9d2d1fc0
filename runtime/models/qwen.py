"""Qwen2, Qwen2.5 and Qwen3: Llama with biases of q, k and v (2), or with a norm of each head of q and k (3)."""

from dataclasses import replace

from . import common
from .fields import Fields
from .spec import ModelSpec


def qwen2_spec(config: Fields, generation: Fields, architecture: str) -> ModelSpec:
    """config.json and generation_config.json (which may be empty). Raises CheckpointError on what is unsupported."""
    spec = common.base_spec(config, generation, architecture)
    return replace(spec, qkv_bias=True, layer_windows=_windows(config))


def qwen3_spec(config: Fields, generation: Fields, architecture: str) -> ModelSpec:
    """As qwen2_spec; the head size does not follow from the hidden size."""
    spec = common.base_spec(config, generation, architecture, head_dim=common.head_size(config, 128))
    return replace(spec, qk_norm="head", layer_windows=_windows(config))


def _windows(config: Fields) -> tuple[int | None, ...]:
    """With use_sliding_window the layers from `max_window_layers` on have a window, unless layer_types says which."""
    used = config.flag("use_sliding_window", False)
    window = config.optional_integer("sliding_window", 4096) if used else None
    first = config.count("max_window_layers", 28)
    kinds = [
        common.SLIDING if window is not None and layer >= first else common.FULL
        for layer in range(config.integer("num_hidden_layers"))
    ]
    return common.windows(config, window, kinds)

"""Mistral: Llama with one sliding window for all layers (Jiang et al., 2023, arXiv:2310.06825)."""

from dataclasses import replace

from . import common
from .fields import Fields
from .spec import ModelSpec


def spec_from_config(config: Fields, generation: Fields, architecture: str) -> ModelSpec:
    """config.json and generation_config.json (which may be empty). Raises CheckpointError on what is unsupported."""
    config.refuse("layer_types")  # of later families of this maker; transformers does not read it here
    spec = common.base_spec(config, generation, architecture)
    window = config.optional_integer("sliding_window", 4096)  # null since version 0.2: none
    return replace(spec, layer_windows=(window,) * spec.num_layers)

"""Llama 1 to 3.x (arXiv:2302.13971, arXiv:2407.21783): what the other families are described against."""

from . import common
from .fields import Fields
from .spec import ModelSpec


def spec_from_config(config: Fields, generation: Fields, architecture: str) -> ModelSpec:
    """config.json and generation_config.json (which may be empty). Raises CheckpointError on what is unsupported."""
    return common.base_spec(config, generation, architecture)

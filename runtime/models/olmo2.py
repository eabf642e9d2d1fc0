"""OLMo 2 (arXiv:2501.00656): norms only of what attention and MLP add, and of q and of k over all their heads."""

from dataclasses import replace

from . import common
from .fields import Fields
from .spec import ModelSpec, TensorNames

NAMES = TensorNames(
    attention_norm=None,
    attention_out_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_out_norm="post_feedforward_layernorm",
)


def spec_from_config(config: Fields, generation: Fields, architecture: str) -> ModelSpec:
    """config.json and generation_config.json (which may be empty). Raises CheckpointError on what is unsupported."""
    spec = common.base_spec(config, generation, architecture, rms_norm_eps=1e-5)
    return replace(spec, names=NAMES, qk_norm="width")

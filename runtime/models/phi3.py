"""Phi-3 and Phi-4 (arXiv:2404.14219): Llama whose checkpoints store q, k and v as one tensor, and gate and up as one."""

from dataclasses import replace

from . import common
from .fields import Fields
from .spec import ModelSpec, TensorNames

QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"


def spec_from_config(config: Fields, generation: Fields, architecture: str) -> ModelSpec:
    """config.json and generation_config.json (which may be empty). Raises CheckpointError on what is unsupported.

    Of the rotary embeddings only the default one: what these checkpoints call "su" or "yarn" is longrope.
    """
    rotary = common.rotary_from_config(
        config, common.head_size(config), rope_types=("default",), partial=True
    )
    spec = common.base_spec(config, generation, architecture, rotary=rotary, rms_norm_eps=1e-5)
    return replace(
        spec,
        names=TensorNames(q=QKV, k=QKV, v=QKV, gate=GATE_UP, up=GATE_UP),
        layer_windows=(config.optional_integer("sliding_window"),) * spec.num_layers,
    )

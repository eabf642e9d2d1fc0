"""Gemma 2 (arXiv:2408.00118) and the text models of Gemma 3 (arXiv:2503.19786).

Norms before and after attention and MLP, which multiply by 1 + weight; embeddings times sqrt(hidden_size); tanh GELU;
layers with a window between layers with full attention. Gemma 2 caps the logits of attention and of the model;
Gemma 3 norms the heads of q and k instead, and turns by other angles in the layers with a window.
"""

from dataclasses import replace

from . import common
from .fields import Fields
from .spec import ModelSpec, RotarySpec, TensorNames

NAMES = TensorNames(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)


def gemma2_spec(config: Fields, generation: Fields, architecture: str) -> ModelSpec:
    """config.json and generation_config.json (which may be empty). Raises CheckpointError on what is unsupported."""
    rotary = common.rotary_from_config(config, _head_dim(config))
    return replace(
        _gemma(config, generation, architecture, rotary, full_every=2),
        attention_soft_cap=config.optional_number("attn_logit_softcapping", 50.0),
        logit_soft_cap=config.optional_number("final_logit_softcapping", 30.0),
    )


def gemma3_spec(config: Fields, generation: Fields, architecture: str) -> ModelSpec:
    """As gemma2_spec; older configs have rope_local_base_freq, and rope_scaling for the full layers alone."""
    config.refuse("attn_logit_softcapping")  # transformers has the field and does not read it
    head_dim, positions = _head_dim(config), common.max_positions(config)
    if config.has("rope_parameters"):
        rope = config.group("rope_parameters")
        full, local = rope.group(common.FULL), rope.group(common.SLIDING)
    else:
        full, local = config.group("rope_scaling"), Fields(config.source, {})
    full_theta = config.number("rope_theta", 1e6)
    local_theta = config.number("rope_local_base_freq", 10000.0)
    return replace(
        _gemma(
            config,
            generation,
            architecture,
            common.rotary_from_fields(full, full_theta, head_dim, positions),
            full_every=config.integer("sliding_window_pattern", 6),
        ),
        window_rotary=common.rotary_from_fields(local, local_theta, head_dim, positions),
        qk_norm="head",
        logit_soft_cap=config.optional_number("final_logit_softcapping"),
    )


def _gemma(
    config: Fields, generation: Fields, architecture: str, rotary: RotarySpec, full_every: int
) -> ModelSpec:
    """What both have; without layer_types every `full_every`-th layer has full attention."""
    config.refuse("use_bidirectional_attention", False)
    spec = common.base_spec(
        config,
        generation,
        architecture,
        head_dim=_head_dim(config),
        rotary=rotary,
        activation="gelu_tanh",
        tie_embeddings=True,
    )
    kinds = [common.SLIDING if layer % full_every else common.FULL for layer in range(1, spec.num_layers + 1)]
    return replace(
        spec,
        names=NAMES,
        norm_offset=1.0,
        layer_windows=common.windows(config, config.optional_integer("sliding_window", 4096), kinds),
        attention_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        embedding_scale=spec.hidden_size**0.5,
    )


def _head_dim(config: Fields) -> int:
    return common.head_size(config, 256)

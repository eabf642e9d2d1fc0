"""GGUF metadata and tensor names in Hugging Face's words, so that a family reads them as it reads a config.json.

What files leave out is what llama.cpp knows of an architecture (its model loaders, and gguf.constants for names).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from . import common, gemma, llama, phi3, qwen
from .fields import CheckpointError, Fields
from .spec import FrequencyFactors, ModelSpec, TensorNames

ARCHITECTURES: dict[str, Callable[[Fields, Fields, str], ModelSpec]] = {
    "llama": llama.spec_from_config,
    "qwen2": qwen.qwen2_spec,
    "qwen3": qwen.qwen3_spec,
    "gemma2": gemma.gemma2_spec,
    "gemma3": gemma.gemma3_spec,
    "phi3": phi3.spec_from_config,
}
WINDOWED = ("gemma2", "gemma3", "phi3")
# The 27B models, by their number of layers, divide attention logits by the root of hidden_size / heads, and the others
# by that of head_dim; files do not say so.
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
# Rows of each head of q and k interleaved for llama.cpp's rotary. The other architectures have Hugging Face's order.
PERMUTED = {"llama": ("attn_q.weight", "attn_k.weight")}

WHOLE_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def known_architecture(metadata: Fields) -> str:
    """The file's architecture. Raises CheckpointError for one that is not supported."""
    name = metadata.text("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{metadata.source}: architecture {name!r} is not supported; "
            f"supported in GGUF files: {', '.join(ARCHITECTURES)}"
        )
    return name


def spec_from_gguf(
    metadata: Fields,
    *,
    vocab_size: int,
    tie_embeddings: bool,
    frequency_factors: tuple[float, ...] | None,
) -> ModelSpec:
    """GGUF metadata; what only the tensors tell is passed in. Raises CheckpointError on what is unsupported."""
    architecture = known_architecture(metadata)
    config = _config(metadata, architecture) | {
        "vocab_size": vocab_size,
        "tie_word_embeddings": tie_embeddings,
    }
    spec = ARCHITECTURES[architecture](Fields(metadata.source, config), Fields("", {}), architecture)
    if frequency_factors is not None:
        if spec.rotary.scaling is not None:
            raise CheckpointError(
                f"{metadata.source}: both rope_freqs.weight and linear rope scaling are set; use one"
            )
        rotary = replace(spec.rotary, scaling=FrequencyFactors(frequency_factors))
        spec = replace(spec, rotary=rotary)
    return replace(spec, norm_offset=0.0)  # llama.cpp's converter adds it


def canonical_name(name: str, names: TensorNames) -> str:
    """Hugging Face's name of a GGUF tensor, or the name itself if it has none (then it is unexpected)."""
    if name in WHOLE_MODEL:
        return WHOLE_MODEL[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk":
        _, layer, op, kind = parts
        theirs = _block_names(names).get(op)
        if theirs is not None:
            return f"model.layers.{layer}.{theirs}.{kind}"
    return name


def _block_names(names: TensorNames) -> dict[str, str | None]:
    fused = {"attn_qkv": names.q} if names.q == names.k else {}
    return fused | {
        "attn_norm": names.attention_norm,
        "attn_q": names.q,
        "attn_k": names.k,
        "attn_v": names.v,
        "attn_q_norm": names.q_norm,
        "attn_k_norm": names.k_norm,
        "attn_output": names.o,
        "post_attention_norm": names.attention_out_norm,
        "ffn_norm": names.mlp_norm,
        "ffn_gate": names.gate,
        "ffn_up": names.up,
        "ffn_down": names.down,
        "post_ffw_norm": names.mlp_out_norm,
    }


def _config(metadata: Fields, architecture: str) -> dict[str, Any]:
    """The fields that a config.json of this model would have."""

    def key(name: str) -> str:
        return f"{architecture}.{name}"

    metadata.refuse(key("expert_count"), 0)
    metadata.refuse(key("rope.scaling.type"), "none", "linear")
    metadata.refuse(key("attention.sliding_window_pattern"), 6)
    hidden_size = metadata.integer(key("embedding_length"))
    num_heads = metadata.integer(key("attention.head_count"))
    num_layers = metadata.integer(key("block_count"))
    head_dim = metadata.integer(key("attention.key_length"), max(1, hidden_size // num_heads))
    metadata.refuse(key("attention.value_length"), head_dim)
    ends = ("eos_token_id", "eot_token_id", "eom_token_id")
    config: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.integer(key("attention.head_count_kv"), num_heads),
        "num_hidden_layers": num_layers,
        "head_dim": head_dim,
        "intermediate_size": metadata.integer(key("feed_forward_length")),
        "rms_norm_eps": metadata.number(key("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": metadata.integer(key("context_length")),
        "eos_token_id": list(common.merged(*(metadata.token_ids(f"tokenizer.ggml.{name}") for name in ends))),
        "bos_token_id": metadata.values.get("tokenizer.ggml.bos_token_id"),
    }
    for theirs, ours in (
        ("rope.freq_base", "rope_theta"),
        ("rope.freq_base_swa", "rope_local_base_freq"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        if metadata.has(key(theirs)):
            config[ours] = metadata.number(key(theirs))
    if metadata.values.get(key("rope.scaling.type")) == "linear":
        config["rope_scaling"] = {
            "rope_type": "linear",
            "factor": metadata.number(key("rope.scaling.factor")),
        }
    if architecture == "phi3":
        rotary_dim = metadata.integer(key("rope.dimension_count"), head_dim)
        config["partial_rotary_factor"] = rotary_dim / head_dim
    else:
        metadata.refuse(key("rope.dimension_count"), head_dim)
    if architecture not in WINDOWED:
        metadata.refuse(key("attention.sliding_window"), 0)
    elif metadata.has(key("attention.sliding_window")):
        config["sliding_window"] = metadata.count(key("attention.sliding_window"), 0) or None
    if architecture in LAYERS_OF_27B:
        large = num_layers == LAYERS_OF_27B[architecture]
        config["query_pre_attn_scalar"] = hidden_size // num_heads if large else head_dim
    return config

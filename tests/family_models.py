"""A tiny random model of every family, by transformers' own classes; nothing in them is left at one or zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

# Six query heads in two groups: two shards have one each, from three on KV heads are replicated.
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # large enough that logits differ clearly between tokens
}
# Of 4 pairs, those in the middle lie on the ramp: at 1/3 and 2/3, or at 0.30 and 0.69 where its ends are not rounded.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.1,
}
GEMMA3 = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4, "tie_word_embeddings": True}

# Windows are shorter than the tests' prompts, and caps small enough that most values feel them.
CASES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama_linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}),
    "llama_yarn": (LlamaConfig, {"rope_parameters": YARN}),
    "mistral": (MistralConfig, {"sliding_window": 4, "head_dim": 16}),
    "mistral_without_window": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2_windows": (
        Qwen2Config,
        {
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 1,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "gemma2": (
        Gemma2Config,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 4,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (Gemma3TextConfig, GEMMA3 | {"num_hidden_layers": 7}),
    "gemma3_scaled": (
        Gemma3TextConfig,
        GEMMA3
        | {
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "phi3": (Phi3Config, {"sliding_window": 4}),
    "phi3_partial_rotary": (
        Phi3Config,
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "olmo2": (Olmo2Config, {"head_dim": 16}),
}


def make_family_model(case: str, **overrides: Any) -> Any:
    """The float32 model of one of CASES, with eager attention; its config's fields may be overridden."""
    config_class, settings = CASES[case]
    torch.manual_seed(0)
    config = config_class(**(SIZES | settings | overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # Gemma's multiply by one more
            torch.nn.init.normal_(parameter, 0.0 if case.startswith("gemma") else 1.0, 0.2)
        elif name.endswith(".bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.5)
    return model


def make_family_gguf(path: Path, model: Any, architecture: str) -> Path:
    """Write a model the way llama.cpp's converter does: gguf's own names, all in F32, Gemma's norms with their 1."""
    # Here, since GPU machines have no gguf.
    import gguf

    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if architecture in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "phi3":
        writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float() + (1 if "norm" in name and architecture.startswith("gemma") else 0)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

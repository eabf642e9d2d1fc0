"""A tiny random model of every family, by transformers' own classes; nothing in them is left at one or zero."""

from __future__ import annotations

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
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.3,
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
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, "rope_parameters": YARN},
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

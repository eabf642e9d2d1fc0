"""The demo model, which comes as GGUF, in the form that all engines can read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from kvshard.runtime.models.checkpoint import open_checkpoint
from kvshard.runtime.models.parameters import expected_tensors
from kvshard.runtime.models.resolve import fetch_demo
from kvshard.runtime.paths import cache_dir


def demo_checkpoint(max_positions: int | None = None) -> Path:
    """A Hugging Face directory in bfloat16, made once, in kvshard's cache folder. With more positions than the model was
    trained for (`max_positions`) its answers mean nothing, and take the same time."""
    folder = cache_dir() / f"demo-bfloat16-{max_positions or 'own'}"
    if not (folder / "config.json").exists():
        gguf = fetch_demo()
        folder.mkdir(parents=True, exist_ok=True)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        with open_checkpoint(gguf) as checkpoint:
            spec = checkpoint.spec
            tensors = {name: checkpoint.read(name).bfloat16().contiguous() for name in expected_tensors(spec)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            dtype=torch.bfloat16,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.num_q_heads,
            num_key_value_heads=spec.num_kv_heads,
            vocab_size=spec.vocab_size,
            max_position_embeddings=max_positions or spec.max_position_embeddings,
            rms_norm_eps=spec.rms_norm_eps,
            rope_theta=spec.layer_rotary(0).theta,
            tie_word_embeddings=spec.tie_embeddings,
        ).save_pretrained(folder)  # last: its config.json says that all is there
    return folder

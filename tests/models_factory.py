"""Tiny random Llama checkpoints as transformers and llama.cpp write them, and the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvshard.runtime.models.resolve import fetch_demo

if TYPE_CHECKING:
    import gguf

QUANT_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")  # names of GGMLQuantizationType


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct as GGUF; downloaded (93 MB) if it is not in the cache."""
    return fetch_demo()


def make_model(*, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random float32 Llama: 6 query heads in 3 groups of head_dim 24, MLP of 5 runs of 32 columns."""
    settings: dict[str, Any] = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 24,
        "vocab_size": 101,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,  # large enough that logits differ clearly between tokens
    } | overrides
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # transformers starts norms at one, which would hide a norm that is left out
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model


def make_llama(
    path: Path, *, dtype: torch.dtype = torch.float32, shard_bytes: int | None = None, **overrides: Any
) -> Path:
    """Save `make_model(**overrides)` as a Hugging Face directory; `shard_bytes` splits it into several files."""
    model = make_model(**overrides).to(dtype)
    if shard_bytes is None:
        model.save_pretrained(path)
    else:
        model.save_pretrained(path, max_shard_size=shard_bytes)
    return path


def save_word_tokenizer(path: Path, chat_template: str | None = None) -> None:
    """A tokenizer of the words w3 ... w100, into a model's folder."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 101)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(path)


def make_gguf(
    path: Path,
    model: LlamaForCausalLM,
    stored: str = "F16",
    *,
    rope_factors: np.ndarray | None = None,
    rope_scaling: tuple[gguf.RopeScalingType, float] | None = None,
) -> Path:
    """Write a model the way llama.cpp's converter does: its names, q and k rows interleaved, norms in F32.

    stored: one of QUANT_TYPES.
    """
    # Here, since the tests of the kernels load this file too, on GPU machines without gguf.
    import gguf
    from gguf.quants import quantize

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    if rope_scaling is not None:
        writer.add_rope_scaling_type(rope_scaling[0])
        writer.add_rope_scaling_factor(rope_scaling[1])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            halves = values.reshape(-1, 2, config.head_dim // 2, config.hidden_size)
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        kind = gguf.GGMLQuantizationType[stored if values.ndim == 2 else "F32"]
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(gguf_name, quantize(values, kind), raw_dtype=kind)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

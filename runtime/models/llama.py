"""Llama 1 to 3.x: config fields and tensor names of Hugging Face directories and of GGUF files."""

from . import common
from .fields import CheckpointError, Fields
from .spec import FrequencyFactors, LinearScaling, ModelSpec, RotarySpec

# GGUF names of whole-model tensors and of those of block N ("blk.N."), and what Hugging Face calls them.
GGUF_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
GGUF_BLOCK_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
GGUF_PERMUTED = ("attn_q.weight", "attn_k.weight")  # rows of each head interleaved for llama.cpp's rotary


def spec_from_config(config: Fields, generation: Fields, architecture: str) -> ModelSpec:
    """config.json and generation_config.json (which may be empty). Raises CheckpointError on what is unsupported."""
    return common.base_spec(config, generation, architecture)


def spec_from_gguf(
    metadata: Fields,
    *,
    vocab_size: int,
    tie_embeddings: bool,
    frequency_factors: tuple[float, ...] | None,
) -> ModelSpec:
    """GGUF metadata; what only the tensors tell is passed in. Raises CheckpointError on what is unsupported."""
    metadata.refuse("llama.expert_count", 0)
    metadata.refuse("llama.attention.sliding_window", 0)
    metadata.refuse("llama.rope.scaling.type", "none", "linear")
    hidden_size = metadata.integer("llama.embedding_length")
    num_q_heads = metadata.integer("llama.attention.head_count")
    num_kv_heads = metadata.integer("llama.attention.head_count_kv", num_q_heads)
    num_layers = metadata.integer("llama.block_count")
    head_dim = metadata.integer("llama.attention.key_length", max(1, hidden_size // num_q_heads))
    common.check_heads(metadata.source, num_q_heads, num_kv_heads, head_dim)
    metadata.refuse("llama.attention.value_length", head_dim)
    metadata.refuse("llama.rope.dimension_count", head_dim)
    scaling: LinearScaling | FrequencyFactors | None = None
    if metadata.values.get("llama.rope.scaling.type") == "linear":
        scaling = LinearScaling(metadata.number("llama.rope.scaling.factor"))
    if frequency_factors is not None:
        if scaling is not None:
            raise CheckpointError(
                f"{metadata.source}: both rope_freqs.weight and linear rope scaling are set; use one"
            )
        scaling = FrequencyFactors(frequency_factors)
    bos = metadata.token_ids("tokenizer.ggml.bos_token_id")
    ends = ("eos_token_id", "eot_token_id", "eom_token_id")
    return ModelSpec(
        architecture="llama",
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=metadata.integer("llama.feed_forward_length"),
        vocab_size=vocab_size,
        layer_windows=(None,) * num_layers,
        rms_norm_eps=metadata.number("llama.attention.layer_norm_rms_epsilon"),
        rotary=RotarySpec(metadata.number("llama.rope.freq_base", 10000.0), head_dim, scaling),
        tie_embeddings=tie_embeddings,
        max_position_embeddings=metadata.integer("llama.context_length"),
        eos_token_ids=common.merged(*(metadata.token_ids(f"tokenizer.ggml.{name}") for name in ends)),
        bos_token_id=bos[0] if bos else None,
    )

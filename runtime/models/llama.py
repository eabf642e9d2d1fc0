"""Llama 1 to 3.x: config fields and tensor names of Hugging Face directories and of GGUF files."""

from .fields import CheckpointError, Fields
from .spec import FrequencyFactors, LinearScaling, Llama3Scaling, ModelSpec, RotarySpec

DTYPES = ("float32", "float16", "bfloat16")
ROPE_TYPES = ("default", "linear", "llama3")

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
    config.refuse("hidden_act", "silu")
    config.refuse("attention_bias", False)
    config.refuse("mlp_bias", False)
    config.refuse("quantization_config")
    config.refuse("partial_rotary_factor", 1.0)
    dtype = config.text("dtype", config.text("torch_dtype", "float32"))
    if dtype not in DTYPES:
        raise CheckpointError(f"{config.source}: dtype={dtype!r} is not supported; use {', '.join(DTYPES)}")
    hidden_size = config.integer("hidden_size")
    num_q_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_q_heads)
    num_layers = config.integer("num_hidden_layers")
    head_dim = config.integer("head_dim", max(1, hidden_size // num_q_heads))
    _check_heads(config.source, num_q_heads, num_kv_heads, head_dim)
    max_positions = config.integer("max_position_embeddings", 2048)
    bos = config.token_ids("bos_token_id")
    return ModelSpec(
        architecture=architecture,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        layer_windows=(None,) * num_layers,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rotary=rotary_from_config(config, head_dim, max_positions),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        max_position_embeddings=max_positions,
        eos_token_ids=_merged(config.token_ids("eos_token_id"), generation.token_ids("eos_token_id")),
        bos_token_id=bos[0] if bos else None,
    )


def rotary_from_config(config: Fields, head_dim: int, max_positions: int) -> RotarySpec:
    """`rope_parameters` as transformers 5 writes it, or `rope_theta` and `rope_scaling` as older ones did."""
    rope = config.group("rope_parameters" if config.has("rope_parameters") else "rope_scaling")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    kind = rope.text("rope_type", rope.text("type", "default"))
    rope.refuse("partial_rotary_factor", 1.0)
    match kind:
        case "default":
            return RotarySpec(theta, head_dim)
        case "linear":
            return RotarySpec(theta, head_dim, LinearScaling(rope.number("factor")))
        case "llama3":
            scaling = Llama3Scaling(
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_position_embeddings=rope.integer(
                    "original_max_position_embeddings", max_positions
                ),
            )
            if not scaling.low_freq_factor < scaling.high_freq_factor:
                raise CheckpointError(
                    f"{rope.source}: low_freq_factor={scaling.low_freq_factor} must be less than "
                    f"high_freq_factor={scaling.high_freq_factor}"
                )
            return RotarySpec(theta, head_dim, scaling)
    raise CheckpointError(
        f"{rope.source}: rope_type={kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
    )


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
    _check_heads(metadata.source, num_q_heads, num_kv_heads, head_dim)
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
        eos_token_ids=_merged(*(metadata.token_ids(f"tokenizer.ggml.{name}") for name in ends)),
        bos_token_id=bos[0] if bos else None,
    )


def _check_heads(source: str, num_q_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if num_q_heads % num_kv_heads:
        raise CheckpointError(
            f"{source}: {num_q_heads} query heads are not a multiple of {num_kv_heads} KV heads"
        )
    if head_dim % 2:
        raise CheckpointError(f"{source}: head_dim={head_dim} is odd; rotary embedding pairs its elements")


def _merged(*ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({token_id for some in ids for token_id in some}))

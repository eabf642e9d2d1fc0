"""What the families share: reading config.json's fields into a ModelSpec, with Llama's values where a family says nothing."""

import math
from collections.abc import Sequence

from .fields import CheckpointError, Fields
from .spec import Activation, LinearScaling, Llama3Scaling, ModelSpec, RotarySpec, YarnScaling

DTYPES = ("float32", "float16", "bfloat16")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ACTIVATIONS: dict[Activation, tuple[str, str]] = {  # field and value that ask for it
    "silu": ("hidden_act", "silu"),
    "gelu_tanh": ("hidden_activation", "gelu_pytorch_tanh"),
}
SLIDING, FULL = "sliding_attention", "full_attention"


def base_spec(
    config: Fields,
    generation: Fields,
    architecture: str,
    *,
    head_dim: int | None = None,
    rotary: RotarySpec | None = None,
    activation: Activation = "silu",
    rms_norm_eps: float = 1e-6,
    tie_embeddings: bool = False,
) -> ModelSpec:
    """The spec of a Llama with these fields; a family replaces what it has otherwise.

    config: config.json; generation: generation_config.json, which may be empty. head_dim: default hidden_size /
    heads. rotary: default what the config's top level says. rms_norm_eps, tie_embeddings: where the config is silent.
    Raises CheckpointError on what is unsupported.
    """
    config.refuse(*ACTIVATIONS[activation])
    config.refuse("attention_bias", False)
    config.refuse("mlp_bias", False)
    config.refuse("quantization_config")
    dtype = config.text("dtype", config.text("torch_dtype", "float32"))
    if dtype not in DTYPES:
        raise CheckpointError(f"{config.source}: dtype={dtype!r} is not supported; use {', '.join(DTYPES)}")
    num_q_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_q_heads)
    num_layers = config.integer("num_hidden_layers")
    head_dim = head_dim or head_size(config)
    check_heads(config.source, num_q_heads, num_kv_heads, head_dim)
    bos = config.token_ids("bos_token_id")
    return ModelSpec(
        architecture=architecture,
        hidden_size=config.integer("hidden_size"),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        layer_windows=(None,) * num_layers,
        rms_norm_eps=config.number("rms_norm_eps", rms_norm_eps),
        rotary=rotary or rotary_from_config(config, head_dim),
        tie_embeddings=config.flag("tie_word_embeddings", tie_embeddings),
        max_position_embeddings=max_positions(config),
        eos_token_ids=merged(config.token_ids("eos_token_id"), generation.token_ids("eos_token_id")),
        bos_token_id=bos[0] if bos else None,
        activation=activation,
    )


def head_size(config: Fields, default: int | None = None) -> int:
    """`head_dim`, or `default`, or hidden_size / num_attention_heads."""
    if default is None:
        default = max(1, config.integer("hidden_size") // config.integer("num_attention_heads"))
    return config.integer("head_dim", default)


def max_positions(config: Fields) -> int:
    return config.integer("max_position_embeddings", 2048)


def windows(config: Fields, window: int | None, default: Sequence[str]) -> tuple[int | None, ...]:
    """Per layer the window or None, by `layer_types` or, where that is left out, by `default`."""
    kinds = config.values.get("layer_types")
    if kinds is None:
        kinds = default
    num_layers = config.integer("num_hidden_layers")
    if not isinstance(kinds, Sequence) or len(kinds) != num_layers or not set(kinds) <= {SLIDING, FULL}:
        raise CheckpointError(
            f"{config.source}: layer_types={kinds!r} must name {SLIDING} or {FULL} for each of {num_layers} layers"
        )
    if window is None and SLIDING in kinds:
        raise CheckpointError(f"{config.source}: layer_types has {SLIDING}, but there is no sliding_window")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def rotary_from_config(
    config: Fields, head_dim: int, *, rope_types: Sequence[str] = ROPE_TYPES, partial: bool = False
) -> RotarySpec:
    """`rope_parameters` as transformers 5 writes it, or `rope_theta` and `rope_scaling` as older ones did.

    partial: the family rotates the first `partial_rotary_factor` of a head; others refuse less than the whole.
    """
    rope = config.group("rope_parameters" if config.has("rope_parameters") else "rope_scaling")
    factor = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if factor != 1.0 and not (partial and factor < 1.0):
        accepted = "a number above 0 and up to 1" if partial else "1.0"
        raise CheckpointError(
            f"{config.source}: partial_rotary_factor={factor} is not supported; supported: {accepted}"
        )
    rotary_dim = int(head_dim * factor)
    if rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(
            f"{config.source}: partial_rotary_factor={factor} of head_dim={head_dim} are {rotary_dim} elements; "
            "rotary embedding pairs them, so it must be an even number"
        )
    theta = config.number("rope_theta", 10000.0)
    return rotary_from_fields(rope, theta, rotary_dim, max_positions(config), rope_types)


def rotary_from_fields(
    rope: Fields, theta: float, rotary_dim: int, positions: int, rope_types: Sequence[str] = ROPE_TYPES
) -> RotarySpec:
    """One set of rotary parameters. theta, positions: base and trained context where `rope` is silent."""
    theta = rope.number("rope_theta", theta)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in rope_types:
        raise CheckpointError(
            f"{rope.source}: rope_type={kind!r} is not supported; supported: {', '.join(rope_types)}"
        )
    match kind:
        case "linear":
            return RotarySpec(theta, rotary_dim, LinearScaling(rope.number("factor")))
        case "llama3":
            return RotarySpec(theta, rotary_dim, _llama3(rope, positions))
        case "yarn":
            return RotarySpec(theta, rotary_dim, _yarn(rope, positions))
    return RotarySpec(theta, rotary_dim)


def _llama3(rope: Fields, positions: int) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", positions),
    )
    if not scaling.low_freq_factor < scaling.high_freq_factor:
        raise CheckpointError(
            f"{rope.source}: low_freq_factor={scaling.low_freq_factor} must be less than "
            f"high_freq_factor={scaling.high_freq_factor}"
        )
    return scaling


def _yarn(rope: Fields, positions: int) -> YarnScaling:
    factor = rope.number("factor")
    strength = _yarn_strength(factor, 1.0)
    if rope.has("mscale") and rope.has("mscale_all_dim"):
        above, below = rope.number("mscale"), rope.number("mscale_all_dim")
        strength = _yarn_strength(factor, above) / _yarn_strength(factor, below)
    scaling = YarnScaling(
        factor=factor,
        attention_factor=rope.number("attention_factor", strength),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", positions),
        truncate=rope.flag("truncate", True),
    )
    if not scaling.beta_slow < scaling.beta_fast:
        raise CheckpointError(
            f"{rope.source}: beta_slow={scaling.beta_slow} must be less than beta_fast={scaling.beta_fast}"
        )
    return scaling


def _yarn_strength(factor: float, weight: float) -> float:
    """The paper's sqrt(1 / t) = 0.1 ln(factor) + 1, with a weight that some checkpoints set."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def check_heads(source: str, num_q_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if num_q_heads % num_kv_heads:
        raise CheckpointError(
            f"{source}: {num_q_heads} query heads are not a multiple of {num_kv_heads} KV heads"
        )
    if head_dim % 2:
        raise CheckpointError(f"{source}: head_dim={head_dim} is odd; rotary embedding pairs its elements")


def merged(*ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({token_id for some in ids for token_id in some}))

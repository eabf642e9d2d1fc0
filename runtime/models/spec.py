"""What a model is, in one frozen value for the decoder, the memory plan and the loader. No torch here."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from ...parallel.shard_map import ModelDims


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, Chen et al. 2023, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's rule: low frequencies divided by `factor`, high ones kept, a linear ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al., 2023, arXiv:2309.00071): pairs that turn at least `beta_fast` times over the trained context
    are kept, those that turn at most `beta_slow` times are divided by `factor`, with a linear ramp over the pairs
    between; cosines and sines are multiplied by `attention_factor`, so that logits grow by its square."""

    factor: float
    attention_factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int
    truncate: bool  # the ramp begins and ends at whole pairs


@dataclass(frozen=True, slots=True)
class FrequencyFactors:
    """One divisor per frequency, as GGUF files carry it (`rope_freqs.weight`); length rotary_dim / 2."""

    factors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """Rotary embedding of the first `rotary_dim` elements of each head, paired (i, i + rotary_dim / 2)."""

    theta: float
    rotary_dim: int
    scaling: LinearScaling | Llama3Scaling | YarnScaling | FrequencyFactors | None = None

    @property
    def magnitude(self) -> float:
        """Factor of all cosines and sines."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling) else 1.0

    def inv_freq(self) -> list[float]:
        """Angle per position of each of the rotary_dim / 2 pairs, in radians, scaling applied."""
        plain = [self.theta ** (-2.0 * pair / self.rotary_dim) for pair in range(self.rotary_dim // 2)]
        match self.scaling:
            case None:
                return plain
            case LinearScaling(factor):
                return [frequency / factor for frequency in plain]
            case Llama3Scaling():
                return [_llama3_frequency(frequency, self.scaling) for frequency in plain]
            case YarnScaling():
                return self._yarn_frequencies(plain, self.scaling)
            case FrequencyFactors(factors):
                return [frequency / factor for frequency, factor in zip(plain, factors, strict=True)]

    def _yarn_frequencies(self, plain: list[float], scaling: YarnScaling) -> list[float]:
        def pair_of(turns: float) -> float:
            """The pair, as a fraction, that turns so often over the trained context."""
            wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
            return self.rotary_dim * math.log(wavelength) / (2 * math.log(self.theta))

        first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.rotary_dim - 1)
        width = last - first or 0.001  # a ramp of no width: a step
        ramps = [min(1.0, max(0.0, (pair - first) / width)) for pair in range(len(plain))]
        return [
            (1 - ramp) * frequency + ramp * frequency / scaling.factor
            for ramp, frequency in zip(ramps, plain, strict=True)
        ]


def _llama3_frequency(frequency: float, scaling: Llama3Scaling) -> float:
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)  # over the trained context
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = min(1.0, max(0.0, ramp))
    return (1 - keep) * frequency / scaling.factor + keep * frequency


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """A checkpoint's names, by Hugging Face. Those of a layer follow "model.layers.N."; the defaults are Llama's.

    Norms are without ".weight"; one that is None does not exist in the family. Linear layers are without ".weight"
    and ".bias"; those with one name are one tensor there, whose rows are theirs in this order (q, k, v; gate, up).
    """

    attention_norm: str | None = "input_layernorm"  # of what attention reads
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"
    attention_out_norm: str | None = None  # of what attention adds to the residual stream
    mlp_norm: str | None = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    mlp_out_norm: str | None = None


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """The layers with one window. They have block ids, block tables and a number of blocks of their own."""

    window: int | None  # tokens a query sees, itself included; None = all
    num_layers: int


Activation = Literal["silu", "gelu_tanh"]
QKNorm = Literal["head", "width"]


def _narrowness(window: int | None) -> float:
    return -math.inf if window is None else -window


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only model. All sizes are whole-model; q and o widths are num_q_heads * head_dim.

    Layers, with the norms (RMSNorm) that `names` has:
        x += attention_out_norm(attention(attention_norm(x)))
        x += mlp_out_norm(down(activation(gate(y)) * up(y)))    with y = mlp_norm(x)
    then a final RMSNorm and the LM head. The only biases are those of q, k and v.
    """

    architecture: str  # as the checkpoint names it, for messages
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    layer_windows: tuple[int | None, ...]  # per layer: tokens a query sees, itself included; None = all
    rms_norm_eps: float
    rotary: RotarySpec
    window_rotary: RotarySpec | None = None  # of the layers with a window; None = `rotary` too
    tie_embeddings: bool  # the LM head is the embedding matrix
    max_position_embeddings: int
    eos_token_ids: tuple[
        int, ...
    ]  # every id that ends a sequence, sorted; empty if the checkpoint names none
    bos_token_id: int | None
    names: TensorNames = TensorNames()
    activation: Activation = "silu"
    qkv_bias: bool = False
    qk_norm: QKNorm | None = None  # over each head, or over all heads of q and over all of k (OLMo 2)
    norm_offset: float = 0.0  # a norm multiplies by norm_offset + weight; added when weights are read
    attention_scale: float | None = None  # factor of the attention logits; None = head_dim ** -0.5
    attention_soft_cap: float | None = None  # x becomes cap * tanh(x / cap)
    logit_soft_cap: float | None = None  # the same for the model's logits
    embedding_scale: float | None = None  # factor of the embeddings, rounded to the model's dtype; None = 1

    def __post_init__(self) -> None:
        assert len(self.layer_windows) == self.num_layers, "one window per layer"
        assert self.num_q_heads % self.num_kv_heads == 0, "KV groups of equal size"
        assert all(rotary.rotary_dim % 2 == 0 for rotary in self.rotaries), "rotary pairs"

    def layer_rotary(self, layer: int) -> RotarySpec:
        windowed = self.layer_windows[layer] is not None
        return self.window_rotary if windowed and self.window_rotary is not None else self.rotary

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """Full attention first, then the windows from the widest on."""
        counts = Counter(self.layer_windows)
        return tuple(LayerGroup(window, counts[window]) for window in sorted(counts, key=_narrowness))

    def layer_group(self, layer: int) -> int:
        """Index in `layer_groups` of the group that a layer belongs to."""
        windows = [group.window for group in self.layer_groups]
        return windows.index(self.layer_windows[layer])

    @property
    def rotaries(self) -> tuple[RotarySpec, ...]:
        """The rotary embeddings in use, each once."""
        return tuple(dict.fromkeys(self.layer_rotary(layer) for layer in range(self.num_layers)))

    @property
    def dims(self) -> ModelDims:
        return ModelDims(
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            tie_embeddings=self.tie_embeddings,
        )

"""What a model is, in one frozen value for the decoder, the memory plan and the loader. No torch here."""

import math
from dataclasses import dataclass

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
class FrequencyFactors:
    """One divisor per frequency, as GGUF files carry it (`rope_freqs.weight`); length rotary_dim / 2."""

    factors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """Rotary embedding of the first `rotary_dim` elements of each head, paired (i, i + rotary_dim / 2)."""

    theta: float
    rotary_dim: int
    scaling: LinearScaling | Llama3Scaling | FrequencyFactors | None = None

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
            case FrequencyFactors(factors):
                return [frequency / factor for frequency, factor in zip(plain, factors, strict=True)]


def _llama3_frequency(frequency: float, scaling: Llama3Scaling) -> float:
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)  # over the trained context
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = min(1.0, max(0.0, ramp))
    return (1 - keep) * frequency / scaling.factor + keep * frequency


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only model. All sizes are whole-model; q and o widths are num_q_heads * head_dim.

    Layers: RMSNorm, attention, residual, RMSNorm, silu-gated MLP, residual; a final RMSNorm; no biases.
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
    tie_embeddings: bool  # the LM head is the embedding matrix
    max_position_embeddings: int
    eos_token_ids: tuple[
        int, ...
    ]  # every id that ends a sequence, sorted; empty if the checkpoint names none
    bos_token_id: int | None

    def __post_init__(self) -> None:
        assert len(self.layer_windows) == self.num_layers, "one window per layer"
        assert self.num_q_heads % self.num_kv_heads == 0, "KV groups of equal size"
        assert self.rotary.rotary_dim % 2 == 0, "rotary pairs"

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

"""The model families: which architectures are known, by the names that Hugging Face checkpoints use."""

from collections.abc import Callable

from . import gemma, llama, mistral, olmo2, phi3, qwen
from .fields import CheckpointError, Fields
from .spec import ModelSpec

SpecFromConfig = Callable[[Fields, Fields, str], ModelSpec]

ARCHITECTURES: dict[str, SpecFromConfig] = {
    "LlamaForCausalLM": llama.spec_from_config,
    "MistralForCausalLM": mistral.spec_from_config,
    "Qwen2ForCausalLM": qwen.qwen2_spec,
    "Qwen3ForCausalLM": qwen.qwen3_spec,
    "Gemma2ForCausalLM": gemma.gemma2_spec,
    "Gemma3ForCausalLM": gemma.gemma3_spec,
    "Phi3ForCausalLM": phi3.spec_from_config,
    "Olmo2ForCausalLM": olmo2.spec_from_config,
}


def spec_from_config(config: Fields, generation: Fields) -> ModelSpec:
    """The spec of a Hugging Face config. Raises CheckpointError for an unknown architecture or option."""
    names = config.values.get("architectures") or [None]
    name = names[0] if isinstance(names, list) else names
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{config.source}: architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name](config, generation, name)

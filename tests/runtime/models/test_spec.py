"""Configs become specs: fields, rotary frequencies, end-of-sequence ids, and refusals by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models_factory import make_llama
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kvshard.runtime.models.checkpoint_index import read_index
from kvshard.runtime.models.fields import CheckpointError
from kvshard.runtime.models.spec import FrequencyFactors, Llama3Scaling, ModelSpec, RotarySpec

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


def rewrite(checkpoint: Path, folder: Path, **changed: Any) -> Path:
    """A copy of the checkpoint with other config fields; a field set to `...` is taken out."""
    config = json.loads((checkpoint / "config.json").read_text()) | changed
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "generation_config.json"):
        (folder / name).symlink_to(checkpoint / name)
    return folder


def read_spec(checkpoint: Path, folder: Path, **changed: Any) -> ModelSpec:
    return read_index(rewrite(checkpoint, folder, **changed)).spec


def test_fields_come_from_the_config(checkpoint: Path) -> None:
    assert read_index(checkpoint).spec == ModelSpec(
        architecture="LlamaForCausalLM",
        hidden_size=96,
        num_layers=2,
        num_q_heads=6,
        num_kv_heads=3,
        head_dim=24,
        intermediate_size=160,
        vocab_size=101,
        layer_windows=(None, None),
        rms_norm_eps=1e-6,
        rotary=RotarySpec(10000.0, 24),
        tie_embeddings=False,
        max_position_embeddings=512,
        eos_token_ids=(2,),
        bos_token_id=1,
    )


def test_configs_of_before_transformers_5_are_read(checkpoint: Path, tmp_path: Path) -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    spec = read_spec(
        checkpoint,
        tmp_path,
        rope_parameters=...,
        rope_theta=500000.0,
        rope_scaling=scaling,
        dtype=...,
        torch_dtype="bfloat16",
    )
    assert spec.rotary == RotarySpec(500000.0, 24, Llama3Scaling(8.0, 1.0, 4.0, 512))


def test_end_ids_of_both_files_count(checkpoint: Path, tmp_path: Path) -> None:
    rewrite(checkpoint, tmp_path, eos_token_id=[7, 2])
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert read_index(tmp_path).spec.eos_token_ids == (2, 7, 9)


def test_a_checkpoint_without_generation_config_is_fine(checkpoint: Path, tmp_path: Path) -> None:
    rewrite(checkpoint, tmp_path, eos_token_id=None)
    (tmp_path / "generation_config.json").unlink()
    assert read_index(tmp_path).spec.eos_token_ids == ()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "architecture 'MambaForCausalLM' is not supported; supported: LlamaForCausalLM, Mistral",
        ),
        ({"architectures": ...}, "architecture None is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported; supported: False"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; supported: 'silu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config=.*awq.* is not supported"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='dynamic' is not supported; supported: default, linear, llama3, yarn",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor=1.0 must be less than"),
        ({"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn' is not supported"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size='64' must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a whole number of at least 1"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0 must be a number above 0"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a token id or a list"),
        ({"num_key_value_heads": 4}, "6 query heads are not a multiple of 4 KV heads"),
        ({"head_dim": 23}, "head_dim=23 is odd"),
    ],
)
def test_unsupported_and_wrong_options_are_refused_by_name(
    checkpoint: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_spec(checkpoint, tmp_path, **changed)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
        LLAMA3,
        LLAMA3 | {"original_max_position_embeddings": 64, "factor": 32.0},
        YARN,
        YARN | {"truncate": False},
        YARN | {"beta_fast": 4.0, "beta_slow": 2.0},
        YARN | {"attention_factor": 1.25},
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
        YARN | {"original_max_position_embeddings": 2},
    ],
)
@pytest.mark.parametrize("head_dim", [24, 64])
def test_rotary_frequencies_equal_transformers(
    checkpoint: Path, tmp_path: Path, rope: dict[str, Any], head_dim: int
) -> None:
    spec = read_index(make_llama(tmp_path, rope_parameters=rope, head_dim=head_dim)).spec
    reference = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(tmp_path))
    ours = torch.tensor(spec.rotary.inv_freq())
    torch.testing.assert_close(ours, reference.inv_freq, rtol=1e-6, atol=0)
    assert spec.rotary.magnitude == pytest.approx(reference.attention_scaling)


def test_frequency_factors_divide() -> None:
    plain = RotarySpec(10000.0, 4).inv_freq()
    assert RotarySpec(10000.0, 4, FrequencyFactors((2.0, 8.0))).inv_freq() == [plain[0] / 2, plain[1] / 8]

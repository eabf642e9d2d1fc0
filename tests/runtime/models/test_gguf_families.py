"""GGUF files of the families beside Llama: the same spec and the same weights as from the Hugging Face directory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import make_family_gguf, make_family_model
from tolerances import assert_within
from transformers import AutoModelForCausalLM

from kvshard.parallel.shard_map import ShardMap
from kvshard.runtime.models.checkpoint import open_checkpoint
from kvshard.runtime.models.checkpoint_index import read_index
from kvshard.runtime.models.fields import CheckpointError
from kvshard.runtime.shard.weights import load_weights

# Gemma's attention scale is not in the file: it follows from the head size, or in the 27B models from the number of heads.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen2", "qwen2", {}),
    ("qwen2", "qwen2", {"tie_word_embeddings": False}),
    ("qwen3", "qwen3", {}),
    ("gemma2", "gemma2", {"query_pre_attn_scalar": 16}),
    ("gemma2", "gemma2", {"query_pre_attn_scalar": 8, "num_hidden_layers": 46}),
    ("gemma3", "gemma3", {"query_pre_attn_scalar": 16}),
    (
        "gemma3",
        "gemma3",
        {
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    ("phi3", "phi3", {}),
    ("phi3_partial_rotary", "phi3", {"sliding_window": 5}),
]


@pytest.mark.parametrize(("case", "architecture", "overrides"), CASES)
def test_a_gguf_file_is_the_model_that_its_directory_is(
    case: str, architecture: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    model = make_family_model(case, **overrides)
    model.save_pretrained(tmp_path / "directory")
    path = make_family_gguf(tmp_path / "model.gguf", model, architecture)
    expected, spec = read_index(tmp_path / "directory").spec, read_index(path).spec
    assert spec.rms_norm_eps == pytest.approx(expected.rms_norm_eps)  # a float32 in the file
    assert spec.norm_offset == 0.0
    assert expected == replace(
        spec,
        architecture=expected.architecture,
        rms_norm_eps=expected.rms_norm_eps,
        norm_offset=expected.norm_offset,
    )
    for shard in ShardMap.build(spec.dims, 5).shards:
        with open_checkpoint(tmp_path / "directory") as directory, open_checkpoint(path) as file:
            theirs = load_weights(directory, expected, shard, torch.float32, torch.device("cpu"))
            ours = load_weights(file, spec, shard, torch.float32, torch.device("cpu"))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    ("case", "architecture"),
    [("qwen2", "qwen2"), ("qwen3", "qwen3"), ("gemma2", "gemma2"), ("gemma3", "gemma3"), ("phi3", "phi3")],
)
def test_weights_equal_what_transformers_loads(case: str, architecture: str, tmp_path: Path) -> None:
    """Names and Gemma's norms are right, not only consistent with our writer."""
    model = make_family_model(case)
    path = make_family_gguf(tmp_path / "model.gguf", model, architecture)
    # Its tensors by transformers' own code; sizes that it does not read from files come from the model.
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, config=model.config
    )
    with open_checkpoint(path) as checkpoint:
        for name, tensor in reference.state_dict().items():
            if name == "lm_head.weight" and checkpoint.spec.tie_embeddings:
                continue
            gemma_norm = "norm" in name and architecture.startswith("gemma")
            assert_within(checkpoint.read(name), tensor + (1 if gemma_norm else 0), "norm")


@pytest.mark.parametrize(
    ("architecture", "key", "value", "message"),
    [
        ("qwen3", "expert_count", 8, "qwen3.expert_count=8 is not supported; supported: 0"),
        ("qwen2", "attention.sliding_window", 4, "qwen2.attention.sliding_window=4 is not supported"),
        ("qwen2", "rope.dimension_count", 4, "qwen2.rope.dimension_count=4 is not supported; supported: 8"),
    ],
)
def test_what_is_not_supported_is_refused_by_the_files_own_name(
    architecture: str, key: str, value: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    write = gguf.GGUFWriter.add_layer_norm_rms_eps

    def write_more(writer: gguf.GGUFWriter, eps: float) -> None:
        write(writer, eps)
        writer.add_uint32(f"{architecture}.{key}", value)

    monkeypatch.setattr(gguf.GGUFWriter, "add_layer_norm_rms_eps", write_more)
    path = make_family_gguf(tmp_path / "model.gguf", make_family_model(architecture), architecture)
    with pytest.raises(CheckpointError, match=message):
        read_index(path)

"""Every family against transformers' own implementation: each layer and the logits, for shards of every kind.

All models of one number of shards run in the same processes, one after the other: starting them takes longest.
"""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_ranks import reference, trace_all
from family_models import CASES, make_family_model
from ranks import run_ranks
from tolerances import assert_within

from kvshard.parallel.shard_map import ShardMap
from kvshard.runtime.models.checkpoint import open_checkpoint
from kvshard.runtime.models.checkpoint_index import read_index
from kvshard.runtime.models.fields import CheckpointError
from kvshard.runtime.models.parameters import local_parameters, weight_bytes
from kvshard.runtime.shard.weights import load_weights

PROMPTS = [[5, 17, 99, 3, 42, 8, 77], [61, 2, 30], [9, 9, 54, 12, 80, 33, 21, 4, 6, 11, 71, 25, 90]]
CUT = 2  # prompts are run in two steps, so that the second reads the cache of the first
SIZES = (1, 2, 3, 5)  # of 2 KV heads (1 in gemma3_scaled): replicated from 3 (2) on, cut unevenly by 5


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for case in CASES:
        folders[case] = tmp_path_factory.mktemp(case)
        make_family_model(case).save_pretrained(folders[case])
    return folders


@pytest.fixture(scope="module")
def traced(checkpoints: dict[str, Path]) -> Any:
    """Size to what each rank traced of every model."""
    return functools.cache(lambda size: run_ranks(trace_all, size, checkpoints, PROMPTS, CUT))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_layers_and_logits_equal_transformers(case: str, size: int, traced: Any) -> None:
    expected_layers, expected_logits = expected(case)
    for of_rank in traced(size):
        layers, logits = of_rank[case]
        assert layers.keys() == expected_layers.keys()
        for layer, values in expected_layers.items():
            assert_within(torch.from_numpy(layers[layer]), values, "hidden")
        assert_within(torch.from_numpy(logits), expected_logits, "logits")


@functools.cache
def expected(case: str) -> Any:
    return reference(make_family_model(case), PROMPTS)


# What a family adds to Llama, and what the model would be without it.
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama_linear", {"rope_parameters": {"rope_type": "default"}}),
    ("llama_yarn", {"rope_parameters": {"rope_type": "default"}}),
    ("mistral", {"sliding_window": 5}),
    ("qwen2_windows", {"max_window_layers": 0}),
    ("qwen2_windows", {"use_sliding_window": False}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 16}),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("gemma3_scaled", {"final_logit_softcapping": None}),
    ("gemma3_scaled", {"sliding_window": 5}),
    ("phi3", {"sliding_window": None}),
    ("phi3_partial_rotary", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}),
]


@pytest.mark.parametrize(("case", "changed"), OPTIONS)
def test_every_option_is_felt(case: str, changed: dict[str, Any]) -> None:
    """The comparison above would see the option left out: transformers' logits differ by far more than the bound."""
    _, logits = expected(case)
    _, without = reference(make_family_model(case, **changed), PROMPTS)
    assert (logits - without).abs().max() > 0.01


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("case", ["phi3", "qwen2", "olmo2", "gemma2"])
def test_what_a_rank_loads_is_read_once_and_planned(
    case: str, world_size: int, checkpoints: dict[str, Path]
) -> None:
    """Rows of fused tensors, biases and split norms: their bytes are read once, and the memory plan knows them."""
    spec = read_index(checkpoints[case]).spec
    for shard in ShardMap.build(spec.dims, world_size).shards:
        with open_checkpoint(checkpoints[case]) as checkpoint:
            weights = load_weights(checkpoint, spec, shard, torch.float32, torch.device("cpu"))
        assert list(weights) == [parameter.name for parameter in local_parameters(spec, shard)]
        storages = {tensor.data_ptr(): tensor.nbytes for tensor in weights.values() if tensor.numel()}
        assert sum(storages.values()) == weight_bytes(spec, shard, 4) == checkpoint.bytes_read


def test_norms_that_multiply_by_one_more_are_rounded_once(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    spec = read_index(checkpoints["gemma2"]).spec
    shard = ShardMap.build(spec.dims, 1).shard(0)
    with open_checkpoint(checkpoints["gemma2"]) as checkpoint:
        weights = load_weights(checkpoint, spec, shard, torch.bfloat16, torch.device("cpu"))
    stored = make_family_model("gemma2").model.norm.weight
    assert torch.equal(weights["final_norm"], (1 + stored).to(torch.bfloat16))


def rewrite(checkpoint: Path, folder: Path, **changed: Any) -> Path:
    """A copy of the checkpoint with other config fields; a field set to `...` is taken out."""
    config = json.loads((checkpoint / "config.json").read_text()) | changed
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    return folder


def test_configs_of_before_transformers_5_are_read(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Gemma 3 as its makers published it: two bases beside each other, scaling of the full layers, a pattern."""
    folder = rewrite(
        checkpoints["gemma3_scaled"],
        tmp_path,
        rope_parameters=...,
        layer_types=...,
        tie_word_embeddings=...,
        rope_theta=1000000.0,
        rope_local_base_freq=100.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=2,
    )
    assert read_index(folder).spec == read_index(checkpoints["gemma3_scaled"]).spec


def test_fields_that_are_left_out_have_the_familys_values(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = rewrite(
        checkpoints["gemma2"],
        tmp_path,
        attn_logit_softcapping=...,
        final_logit_softcapping=None,
        layer_types=...,
        sliding_window=...,
    )
    spec = read_index(folder).spec
    assert (spec.attention_soft_cap, spec.logit_soft_cap) == (50.0, None)
    assert spec.layer_windows == (4096, None)


@pytest.mark.parametrize(
    ("case", "changed", "message"),
    [
        (
            "qwen2",
            {"architectures": ["Qwen2MoeForCausalLM"]},
            "architecture 'Qwen2MoeForCausalLM' is not supp",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias=True is not supported; supported: False"),
        (
            "mistral",
            {"layer_types": ["full_attention"] * 2},
            "layer_types=.* is not supported; supported: to leave",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window=0 must be a whole number of at least 1"),
        (
            "qwen2",
            {"layer_types": ["sliding_attention"] * 2},
            "layer_types has .*, but there is no sliding_window",
        ),
        (
            "qwen2",
            {"layer_types": ["full_attention"]},
            "must name sliding_attention or full_attention for each of 2",
        ),
        (
            "gemma2",
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types=.*chunked.* must name",
        ),
        (
            "gemma2",
            {"hidden_activation": "gelu"},
            "hidden_activation='gelu' is not supported; supported: 'gelu_py",
        ),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention=True is not supported",
        ),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope_type='longrope' is not supported; supp",
        ),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_type='yarn' is not supported; supported: default$",
        ),
        (
            "phi3",
            {"partial_rotary_factor": 0.4, "rope_parameters": ...},
            "are 3 elements; .* must be an even number",
        ),
        (
            "qwen2",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5 is not supported; supported: 1.0",
        ),
        (
            "qwen3",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config=.*fp8.* is not supported",
        ),
        (
            "olmo2",
            {"rope_parameters": {"rope_type": "dynamic"}},
            "rope_type='dynamic' is not supported; supported",
        ),
        ("llama_yarn", {"rope_parameters": {"rope_type": "yarn"}}, "factor is missing"),
        (
            "llama_yarn",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0}},
            "beta_slow=1.0 must be less than beta_fast=1.0",
        ),
        ("qwen2", {"architectures": ["LlamaForCausalLM"]}, r"unexpected tensors: .*q_proj\.bias"),
        (
            "llama_yarn",
            {"architectures": ["Phi3ForCausalLM"], "rope_parameters": ...},
            "missing tensors: .*qkv_proj",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    case: str, changed: dict[str, Any], message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_index(rewrite(checkpoints[case], tmp_path, **changed))

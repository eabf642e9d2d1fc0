"""A shard's weights: each equals its slice of the whole model, and only those slices are read."""

from pathlib import Path

import pytest
import torch
from models_factory import make_gguf, make_llama, make_model
from safetensors.torch import load_file

from kvshard.parallel.shard_map import Shard, ShardMap
from kvshard.runtime.models.checkpoint import open_checkpoint
from kvshard.runtime.models.parameters import local_parameters, weight_bytes
from kvshard.runtime.models.spec import ModelSpec
from kvshard.runtime.shard.weights import load_weights

CPU = torch.device("cpu")


def expected_weights(
    whole: dict[str, torch.Tensor], spec: ModelSpec, shard: Shard
) -> dict[str, torch.Tensor]:
    """The local weights, cut by head from the whole tensors."""

    def heads(name: str, indices: range) -> torch.Tensor:
        tensor = whole[name]
        return torch.cat([tensor[head * spec.head_dim : (head + 1) * spec.head_dim] for head in indices])

    local = {"embed": whole["model.embed_tokens.weight"][list(shard.vocab_rows)]}
    for layer in range(spec.num_layers):
        prefix, attention = f"model.layers.{layer}.", f"model.layers.{layer}.self_attn."
        columns = list(shard.mlp_columns)
        q = heads(attention + "q_proj.weight", shard.q_heads)
        k = heads(attention + "k_proj.weight", shard.kv_heads)
        v = heads(attention + "v_proj.weight", shard.kv_heads)
        o = whole[attention + "o_proj.weight"].view(spec.hidden_size, spec.num_q_heads, spec.head_dim)
        gate, up = whole[prefix + "mlp.gate_proj.weight"], whole[prefix + "mlp.up_proj.weight"]
        local |= {
            f"layers.{layer}.attention_norm": whole[prefix + "input_layernorm.weight"],
            f"layers.{layer}.qkv": torch.cat([q, k, v]),
            f"layers.{layer}.o": o[:, list(shard.q_heads)].flatten(1),
            f"layers.{layer}.mlp_norm": whole[prefix + "post_attention_layernorm.weight"],
            f"layers.{layer}.gate_up": torch.cat([gate[columns], up[columns]]),
            f"layers.{layer}.down": whole[prefix + "mlp.down_proj.weight"][:, columns],
        }
    local["final_norm"] = whole["model.norm.weight"]
    head = "model.embed_tokens.weight" if spec.tie_embeddings else "lm_head.weight"
    local["lm_head"] = whole[head][list(shard.vocab_rows)]
    return local


CASES = {
    "untied": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "one_kv_head": {"num_key_value_heads": 1},
    "every_head_its_own": {"num_key_value_heads": 6},
}


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("case", CASES)
def test_every_rank_loads_its_slices_and_no_more(case: str, world_size: int, tmp_path: Path) -> None:
    path = make_llama(tmp_path, **CASES[case])
    whole = load_file(path / "model.safetensors")
    file_bytes = (path / "model.safetensors").stat().st_size
    spec = open_checkpoint(path).spec
    shard_map = ShardMap.build(spec.dims, world_size)
    for shard in shard_map.shards:
        with open_checkpoint(path) as checkpoint:
            weights = load_weights(checkpoint, spec, shard, torch.float32, CPU)
        expected = expected_weights(whole, spec, shard)
        assert list(weights) == list(expected)
        for name, tensor in expected.items():
            assert torch.equal(weights[name], tensor), name
            assert weights[name].is_contiguous()
        assert (weights["lm_head"] is weights["embed"]) == spec.tie_embeddings

        storages = {tensor.data_ptr(): tensor.nbytes for tensor in weights.values() if tensor.numel()}
        assert sum(storages.values()) == weight_bytes(spec, shard, 4)
        assert checkpoint.bytes_read == weight_bytes(spec, shard, 4), "what is stored in fp32 is read once"
        if world_size > 1:
            assert checkpoint.bytes_read < 0.75 * file_bytes
        if world_size == 6 and case == "every_head_its_own":
            assert checkpoint.bytes_read < 0.3 * file_bytes


def test_weights_come_in_the_asked_for_dtype(tmp_path: Path) -> None:
    path = make_llama(tmp_path, dtype=torch.bfloat16, shard_bytes=60_000)
    with open_checkpoint(path) as checkpoint:
        spec = checkpoint.spec
        shard = ShardMap.build(spec.dims, 2).shard(1)
        weights = load_weights(checkpoint, spec, shard, torch.float32, CPU)
        assert checkpoint.bytes_read == weight_bytes(spec, shard, 2)
    whole = {
        name: tensor.float()
        for file in path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    for name, tensor in expected_weights(whole, spec, shard).items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("stored", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_gguf_ranks_load_slices_of_what_one_rank_loads(stored: str, world_size: int, tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "model.gguf", make_model(head_dim=16), stored)
    with open_checkpoint(path) as checkpoint:
        spec = checkpoint.spec
        whole = {name: checkpoint.read(name).float() for name in checkpoint.index.tensors}
    for shard in ShardMap.build(spec.dims, world_size).shards:
        with open_checkpoint(path) as checkpoint:
            weights = load_weights(checkpoint, spec, shard, torch.float32, CPU)
        for name, tensor in expected_weights(whole, spec, shard).items():
            assert torch.equal(weights[name], tensor), name
        if world_size > 1:
            assert checkpoint.bytes_read < 0.75 * path.stat().st_size


def test_the_demo_model_is_split_in_bytes_read(demo_model: Path) -> None:
    """Reading a third of the heads reads about a third of the file."""
    with open_checkpoint(demo_model) as checkpoint:
        spec = checkpoint.spec
        shard = ShardMap.build(spec.dims, 3).shard(2)
        weights = load_weights(checkpoint, spec, shard, torch.bfloat16, CPU)
    assert checkpoint.bytes_read < 0.34 * demo_model.stat().st_size
    assert weights["layers.29.qkv"].shape == (5 * 64, 576)


def test_a_shard_without_mlp_columns_has_empty_weights(tmp_path: Path) -> None:
    """An MLP of 1 run of 32 columns on 3 ranks: two ranks have none."""
    path = make_llama(tmp_path, intermediate_size=32)
    with open_checkpoint(path) as checkpoint:
        spec = checkpoint.spec
        shards = ShardMap.build(spec.dims, 3).shards
        empty = [shard for shard in shards if not shard.mlp_columns]
        assert len(empty) == 2
        weights = load_weights(checkpoint, spec, empty[0], torch.float32, CPU)
    assert weights["layers.0.gate_up"].shape == (0, 96)
    assert weights["layers.0.down"].shape == (96, 0)


def test_parameters_of_all_ranks_add_up_to_the_model(tmp_path: Path) -> None:
    """Each element of the checkpoint is held once, but for norms (on every rank) and replicated KV heads."""
    spec = open_checkpoint(make_llama(tmp_path)).spec
    for world_size in range(1, 7):
        shard_map = ShardMap.build(spec.dims, world_size)
        held = sum(p.num_elements for s in shard_map.shards for p in local_parameters(spec, s))
        whole = sum(p.num_elements for p in local_parameters(spec, ShardMap.build(spec.dims, 1).shard(0)))
        norms = (2 * spec.num_layers + 1) * spec.hidden_size
        assert held == whole + (world_size - 1) * norms + shard_map.replicated_bytes(1)

"""Matrices kept as codes: made of any checkpoint's numbers or taken from a GGUF file, the same on any number of shards."""

from pathlib import Path

import pytest
import torch
from models_factory import make_gguf, make_llama, make_model
from test_weights import expected_weights

from kvshard.kernels.weight_codes import WeightCodes
from kvshard.parallel.shard_map import ShardMap
from kvshard.runtime.config import parse_config
from kvshard.runtime.errors import ConfigError
from kvshard.runtime.models.checkpoint import Checkpoint, open_checkpoint
from kvshard.runtime.models.fields import CheckpointError
from kvshard.runtime.models.parameters import local_parameters, weight_bytes
from kvshard.runtime.models.spec import ModelSpec
from kvshard.runtime.models.weight_formats import WeightFormats
from kvshard.runtime.shard.weights import Weights, load_weights

CPU = torch.device("cpu")
WHOLE = "embed", "qkv", "o", "gate_up", "down", "lm_head"  # all matrices


def load(
    path: Path, quantization: str, world_size: int = 1, dtype: torch.dtype = torch.float32
) -> list[Weights]:
    """By rank."""
    loaded = []
    for rank in range(world_size):
        with open_checkpoint(path) as checkpoint:
            shard = ShardMap.build(checkpoint.spec.dims, world_size).shard(rank)
            formats = checkpoint.index.weight_formats(quantization)
            loaded.append(load_weights(checkpoint, checkpoint.spec, shard, dtype, CPU, formats))
            storages = {
                tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for weight in loaded[-1].values()
                for tensor in (weight.tensors if isinstance(weight, WeightCodes) else (weight,))
            }
            planned = weight_bytes(checkpoint.spec, shard, dtype.itemsize, formats)
            assert sum(storages.values()) == planned
    return loaded


def wide(weight: torch.Tensor | WeightCodes) -> torch.Tensor:
    return weight.widen() if isinstance(weight, WeightCodes) else weight


def kinds(weights: Weights) -> set[str]:
    """The matrices that are codes, by their names without layers."""
    return {name.split(".")[-1] for name, weight in weights.items() if isinstance(weight, WeightCodes)}


def quantised(checkpoint: Checkpoint, name: str, format: str) -> torch.Tensor:
    """One of the checkpoint's matrices, all of it by one call, as numbers; the vocabulary's always of 8 bits."""
    format = "Q8_0" if "embed" in name or "lm_head" in name else format
    rows, columns = checkpoint.index.tensors[name].shape
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, columns // 32, dtype=torch.float16)
    minima = None
    if format == "Q4_1":
        codes, minima = torch.empty(rows, columns // 2, dtype=torch.uint8), scales.clone()
    out = WeightCodes(codes, scales, minima, torch.float32)
    checkpoint.read_codes(out, format, name)
    return out.widen()


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("stored", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_of_a_file_are_kept(stored: str, world_size: int, tmp_path: Path) -> None:
    """The numbers are those that are loaded without the setting, to the bit; q and k rows in the same order."""
    path = make_gguf(tmp_path / "model.gguf", make_model(head_dim=32), stored)
    for plain, kept in zip(load(path, "none", world_size), load(path, "keep", world_size), strict=True):
        assert kinds(kept) == set(WHOLE)
        assert list(kept) == list(plain)
        for name, weight in kept.items():
            assert torch.equal(wide(weight), plain[name]), name


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize(("quantization", "format"), [("int8", "Q8_0"), ("int4", "Q4_1")])
def test_shards_hold_slices_of_the_same_numbers(
    quantization: str, format: str, world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a matrix is read in many chunks."""
    path = make_llama(tmp_path, head_dim=32, dtype=torch.bfloat16)
    with open_checkpoint(path) as checkpoint:
        spec = checkpoint.spec
        whole = {
            name: quantised(checkpoint, name, format)
            if len(info.shape) == 2
            else checkpoint.read(name).float()
            for name, info in checkpoint.index.tensors.items()
        }
    monkeypatch.setattr("kvshard.runtime.models.checkpoint.CHUNK_BYTES", 1000)
    for shard, weights in zip(
        ShardMap.build(spec.dims, world_size).shards, load(path, quantization, world_size), strict=True
    ):
        assert kinds(weights) == set(WHOLE)
        for name, tensor in expected_weights(whole, spec, shard).items():
            assert torch.equal(wide(weights[name]), tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_are_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    path = make_llama(tmp_path)
    [exact], [rounded] = load(path, "int8"), load(path, "int8", dtype=dtype)
    for name, weight in rounded.items():
        assert torch.equal(wide(weight), wide(exact[name]).to(dtype)), name


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_codes_are_the_nearest(quantization: str, tmp_path: Path) -> None:
    """Half a step away at most; a step is the group's range over its levels, in float16 as is the minimum."""
    path = make_llama(tmp_path, initializer_range=1.0)
    [exact], [weights] = load(path, "none"), load(path, quantization)
    for name, weight in weights.items():
        if isinstance(weight, WeightCodes):
            groups = exact[name].view(-1, 32)
            low, high = groups.amin(1), groups.amax(1)
            spread = torch.maximum(-low, high) if weight.bits == 8 else high - low
            step = spread / (127 if weight.bits == 8 else 15)
            error = (weight.widen().view(-1, 32) - groups).abs().amax(1)
            # The ends are off by what float16 takes from levels * step and from the minimum: 2**-11 of each.
            allowed = torch.maximum(step / 2, 2**-11 * (spread + low.abs())) * 1.01
            assert (error <= allowed).all(), name
            assert (error > 0.4 * step).float().mean() > 0.5, f"{name}: better than codes can be"


def test_odd_groups_and_broken_ones() -> None:
    """Zeros stay zeros, equal numbers stay equal; what is not finite is not hidden."""
    from kvshard.runtime.models.weight_blocks import made

    values = torch.zeros(4, 32)
    values[1], values[2, 7], values[3, 7] = 0.125, float("nan"), float("inf")
    for format in ("Q8_0", "Q4_1"):
        codes, scales, *minima = made(values, format)
        numbers = WeightCodes(codes, scales, minima[0] if minima else None, torch.float32).widen()
        assert torch.equal(numbers[0], values[0])
        assert torch.allclose(numbers[1], values[1], rtol=2**-11)
        assert numbers[2:, 7].isnan().all()


def test_blocks_of_the_asked_for_format_are_taken_as_they_are(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "model.gguf", make_model(head_dim=32), "Q8_0")
    [kept], [made] = load(path, "keep"), load(path, "int8")
    for name, weight in kept.items():
        if isinstance(weight, WeightCodes):
            for a, b in zip(weight.tensors, made[name].tensors, strict=True):
                assert torch.equal(a, b), name


def formats_by_parameter(spec: ModelSpec, formats: WeightFormats) -> dict[str, str | None]:
    shard = ShardMap.build(spec.dims, 1).shard(0)
    found = {p.name.split(".")[-1]: p.format for p in local_parameters(spec, shard, formats)}
    return {name: found[name] for name in WHOLE}


def test_which_matrices_are_codes(tmp_path: Path) -> None:
    """Heads of 16 channels cut groups of 32 on some number of shards, so not on one either; an MLP of 100 columns ends
    within a group."""
    spec = open_checkpoint(make_llama(tmp_path / "a", intermediate_size=100, head_dim=16)).spec
    of = formats_by_parameter(spec, WeightFormats("int8"))
    assert of == dict.fromkeys(WHOLE, "Q8_0") | {"o": None, "down": None}
    spec = open_checkpoint(make_llama(tmp_path / "b", hidden_size=102, head_dim=32)).spec
    of = formats_by_parameter(spec, WeightFormats("int4"))
    assert of == dict.fromkeys(WHOLE, None) | {"o": "Q4_1", "down": "Q4_1"}
    spec = open_checkpoint(make_llama(tmp_path / "c", head_dim=32)).spec
    of = formats_by_parameter(spec, WeightFormats("int4"))
    assert of == dict.fromkeys(WHOLE, "Q4_1") | {"embed": "Q8_0", "lm_head": "Q8_0"}
    shard = ShardMap.build(spec.dims, 1).shard(0)
    for parameter in local_parameters(spec, shard, WeightFormats("int4")):
        assert parameter.format is None or len(parameter.shape) == 2


def test_parts_of_different_types_become_numbers(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "model.gguf", make_model(head_dim=32), "Q4_1")
    index = open_checkpoint(path).index
    stored = {name: info.dtype for name, info in index.tensors.items()}
    stored["model.layers.1.self_attn.v_proj.weight"] = "Q6_K"
    stored["model.layers.1.mlp.up_proj.weight"] = "Q8_0"
    stored["model.layers.1.mlp.down_proj.weight"] = "Q8_0"
    of = formats_by_parameter(index.spec, WeightFormats("keep", stored))
    assert of == dict.fromkeys(WHOLE, "Q4_1") | {"qkv": None, "gate_up": None, "down": "Q8_0"}


def test_refusals(tmp_path: Path) -> None:
    index = open_checkpoint(make_llama(tmp_path, dtype=torch.bfloat16)).index
    with pytest.raises(
        CheckpointError, match=r"quantization: keep is for GGUF .* are BF16; use int8 or int4"
    ):
        index.weight_formats("keep")
    path = make_gguf(tmp_path / "model.gguf", make_model(head_dim=32), "F16")
    with pytest.raises(CheckpointError, match="are F16, F32; use int8 or int4, which are made when weights"):
        open_checkpoint(path).index.weight_formats("keep")
    with pytest.raises(ConfigError, match="quantization='int5'"):
        parse_config({"model": "demo", "quantization": "int5"}, "job.yaml")

"""Finding out what a checkpoint holds, from headers alone: no weights are read and torch is not imported.

`read_index` takes well under 0.3 s, so each shard process does it for itself.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from . import families, gguf_families, gguf_file, safetensors_file
from .fields import CheckpointError, Fields
from .parameters import expected_tensors
from .spec import ModelSpec
from .tensor_info import TensorInfo, listed
from .weight_formats import BlockFormat, Quantization, WeightFormats

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class CheckpointIndex:
    """A model and where its tensors lie: `tensors` by Hugging Face name, files relative to `folder`."""

    folder: Path
    spec: ModelSpec
    tensors: Mapping[str, TensorInfo]

    def weight_formats(self, quantization: Quantization) -> WeightFormats:
        """How a job keeps the matrices. Raises CheckpointError when there are no blocks to keep."""
        stored = {name: info.dtype for name, info in self.tensors.items()}
        types = sorted(set(stored.values()))
        if quantization == "keep" and not set(types) & set(get_args(BlockFormat)):
            raise CheckpointError(
                f"quantization: keep is for GGUF files with {', '.join(get_args(BlockFormat))} blocks, and the tensors in "
                f"{self.folder} are {', '.join(types)}; use int8 or int4, which are made when weights are loaded, or none"
            )
        return WeightFormats(quantization, stored)


def read_index(path: Path) -> CheckpointIndex:
    """Index a Hugging Face directory or a `.gguf` file, and check that its tensors are those of its model.

    Raises CheckpointError with one message: what is missing, damaged, unsupported or of the wrong shape.
    """
    if path.is_dir():
        index = _directory_index(path)
    elif not path.exists():
        raise CheckpointError(f"model {path} does not exist")
    elif path.suffix == ".gguf":
        index = _gguf_index(path)
    else:
        raise CheckpointError(f"model {path} is neither a directory nor a .gguf file")
    _check_tensors(path, index)
    return index


def _directory_index(folder: Path) -> CheckpointIndex:
    config = _json_fields(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation = _json_fields(generation_path) if generation_path.exists() else Fields("", {})
    spec = families.spec_from_config(config, generation)
    index_path = folder / INDEX_NAME
    if index_path.exists():
        files = _indexed_files(index_path)
    elif (folder / SINGLE_NAME).exists():
        files = [SINGLE_NAME]
    else:
        raise CheckpointError(f"{folder}: there is neither {SINGLE_NAME} nor {INDEX_NAME}")
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{index_path}: names {name}, which is missing")
        for info in safetensors_file.read_header(path):
            if info.name in tensors:
                raise CheckpointError(
                    f"{folder}: tensor {info.name} is in both {tensors[info.name].file} and {name}"
                )
            tensors[info.name] = info
    return CheckpointIndex(folder, spec, tensors)


def _indexed_files(index_path: Path) -> list[str]:
    weight_map = _json_fields(index_path).group("weight_map").values
    if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index_path}: weight_map must map tensor names to file names")
    return sorted(set(weight_map.values()))


def _json_fields(path: Path) -> Fields:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return Fields(str(path), values)


def _gguf_index(path: Path) -> CheckpointIndex:
    header = gguf_file.read_header(path)
    metadata = Fields(str(path), header.metadata)
    architecture = gguf_families.known_architecture(metadata)
    stored = {info.name: info for info in header.tensors}
    factors = stored.pop(ROPE_FACTORS, None)
    embedding = stored.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{path}: missing tensors: token_embd.weight")
    spec = gguf_families.spec_from_gguf(
        metadata,
        vocab_size=embedding.num_rows,
        tie_embeddings="output.weight" not in stored,
        frequency_factors=None if factors is None else _read_floats(path, factors),
    )
    permuted = tuple(f".{name}" for name in gguf_families.PERMUTED.get(architecture, ()))
    tensors = {}
    for info in stored.values():
        name = gguf_families.canonical_name(info.name, spec.names)
        head_dim = spec.head_dim if info.name.endswith(permuted) else None
        tensors[name] = replace(info, name=name, permuted_head_dim=head_dim)
    return CheckpointIndex(path.parent, spec, tensors)


def _read_floats(path: Path, info: TensorInfo) -> tuple[float, ...]:
    if info.dtype != "F32":
        raise CheckpointError(f"{path}: tensor {info.name} is stored as {info.dtype}; it must be F32")
    with path.open("rb") as file:
        file.seek(info.offset)
        return struct.unpack(f"<{info.num_bytes // 4}f", file.read(info.num_bytes))


def _check_tensors(path: Path, index: CheckpointIndex) -> None:
    """Compare names and shapes with what the model must have; one error names all that differ."""
    expected = expected_tensors(index.spec)
    found = index.tensors
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and not _harmless(name, index.spec)]
    misshapen = [
        f"{name} is {list(found[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    problems = [
        f"{what}: {listed(names)}"
        for what, names in (
            ("missing tensors", missing),
            ("unexpected tensors", unexpected),
            ("wrong shapes", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")


def _harmless(name: str, spec: ModelSpec) -> bool:
    """Extras that real checkpoints carry: old rotary buffers, and a copy of the embeddings when tied."""
    return name.endswith(".rotary_emb.inv_freq") or (spec.tie_embeddings and name == "lm_head.weight")

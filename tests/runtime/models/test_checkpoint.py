"""Hugging Face directories: slices equal the whole tensors, only the slices are read, and damage is named."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from models_factory import make_llama
from safetensors.torch import load_file, save_file

from kvshard.runtime.models.checkpoint import open_checkpoint
from kvshard.runtime.models.checkpoint_index import read_index
from kvshard.runtime.models.fields import CheckpointError


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def several_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("several"), shard_bytes=100_000, dtype=torch.bfloat16)


@pytest.fixture
def copy(single_file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(single_file, tmp_path / "copy"))


def whole_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_slices_equal_the_whole_tensor_and_nothing_else_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_llama(tmp_path, dtype=dtype)
    for name, whole in whole_tensors(folder).items():
        for axis in range(whole.dim()):
            size = whole.shape[axis]
            for indices in (range(size), range(3, 17), range(size - 1, size), range(5, 5)):
                with open_checkpoint(folder) as checkpoint:
                    part = checkpoint.read(name, axis, indices)
                expected = whole.narrow(axis, indices.start, len(indices))
                assert part.dtype == dtype
                assert torch.equal(part, expected)
                assert checkpoint.bytes_read == expected.nbytes


def test_several_files_are_one_checkpoint(several_files: Path) -> None:
    assert len(list(several_files.glob("*.safetensors"))) > 2
    checkpoint = open_checkpoint(several_files)
    for name, whole in whole_tensors(several_files).items():
        assert torch.equal(checkpoint.read(name), whole)


def test_reading_goes_in_chunks_that_do_not_show(single_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvshard.runtime.models.checkpoint.CHUNK_BYTES", 1000)
    name = "model.layers.0.mlp.down_proj.weight"
    part = open_checkpoint(single_file).read(name, 1, range(32, 96))
    assert torch.equal(part, whole_tensors(single_file)[name][:, 32:96])


def test_reading_casts_into_the_callers_tensor(single_file: Path) -> None:
    out = torch.zeros(4, 101, dtype=torch.float16).t()  # not contiguous either
    open_checkpoint(single_file).read_into(out, "lm_head.weight", 1, range(8, 12))
    assert torch.equal(out, whole_tensors(single_file)["lm_head.weight"][:, 8:12].half())


def test_a_slice_outside_the_tensor_is_our_bug(single_file: Path) -> None:
    with pytest.raises(AssertionError, match=r"lm_head\.weight"):
        open_checkpoint(single_file).read("lm_head.weight", 0, range(90, 120))


def resave(folder: Path, **changed: torch.Tensor | None) -> None:
    """Rewrite model.safetensors with tensors replaced, added, or (None) taken out."""
    tensors = load_file(folder / "model.safetensors") | changed
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


def test_missing_extra_and_misshapen_tensors_are_all_named(copy: Path) -> None:
    resave(
        copy,
        **{
            "model.layers.1.mlp.up_proj.weight": None,
            "model.layers.0.self_attn.q_proj.bias": torch.zeros(144),
            "model.norm.weight": torch.zeros(65),
        },
    )
    with pytest.raises(CheckpointError) as error:
        read_index(copy)
    assert str(error.value) == (
        f"{copy}: missing tensors: model.layers.1.mlp.up_proj.weight; "
        "unexpected tensors: model.layers.0.self_attn.q_proj.bias; "
        "wrong shapes: model.norm.weight is [65], not [96]"
    )


def test_harmless_extras_are_let_pass(tmp_path: Path) -> None:
    folder = make_llama(tmp_path, tie_word_embeddings=True)
    extras = {
        "lm_head.weight": torch.zeros(101, 96),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(12),
    }
    resave(folder, **extras)
    assert read_index(folder).spec.tie_embeddings


def test_a_long_list_of_missing_tensors_is_cut(copy: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(96)}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing tensors: .* and 15 more$"):
        read_index(copy)


def test_missing_files_are_named(copy: Path, several_files: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model .*nowhere does not exist"):
        read_index(tmp_path / "nowhere")
    (tmp_path / "model.bin").touch()
    with pytest.raises(CheckpointError, match=r"neither a directory nor a \.gguf file"):
        read_index(tmp_path / "model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        read_index(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        read_index(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: No such file"):
        read_index(copy)
    split = Path(shutil.copytree(several_files, tmp_path / "split"))
    lost = sorted(split.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json: names {lost.name}, which is missing"):
        read_index(split)


def test_a_tensor_in_two_files_is_refused(several_files: Path, tmp_path: Path) -> None:
    split = Path(shutil.copytree(several_files, tmp_path / "split"))
    first, second = sorted(split.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match=f"is in both {first.name} and {second.name}"):
        read_index(split)


def with_header(path: Path, header: bytes, data: bytes = b"", claimed: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if claimed is None else claimed) + header + data)


@pytest.mark.parametrize(
    ("header", "claimed", "message"),
    [
        (b"{}", 10**12, "it claims 1000000000000 bytes, the file has 10"),
        (b"{x}", None, "not JSON"),
        (b"\xff\xfe{}", None, "not JSON"),
        (b"[1]", None, "not a JSON object"),
        (b'{"a": 1}', None, "entry of tensor a"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}', None, "entry of tensor a"),
        (
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            None,
            r"tensor a has shape \[2\] of F32 but bytes 0 to 4",
        ),
        (b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}', None, "tensor a has shape"),
        (
            b'{"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}',
            None,
            "tensor a has dtype F8_E4M3, which is not supported; supported: F32, F16, BF16",
        ),
    ],
)
def test_a_corrupt_header_says_what_is_wrong(
    copy: Path, header: bytes, claimed: int | None, message: str
) -> None:
    path = copy / "model.safetensors"
    with_header(path, header, claimed=claimed)
    with pytest.raises(CheckpointError, match=message) as error:
        read_index(copy)
    assert str(path) in str(error.value)


def test_an_empty_and_a_cut_file_are_named(copy: Path) -> None:
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(
        CheckpointError, match=rf"cut short: tensor .* ends at byte {len(whole)}, .* {len(whole) - 1}"
    ):
        read_index(copy)
    path.write_bytes(b"")
    with pytest.raises(
        CheckpointError, match="corrupt safetensors header: it claims 0 bytes, the file has 0"
    ):
        read_index(copy)


def test_an_index_without_names_is_refused(several_files: Path, tmp_path: Path) -> None:
    split = Path(shutil.copytree(several_files, tmp_path / "split"))
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(CheckpointError, match="weight_map must map tensor names to file names"):
        read_index(split)

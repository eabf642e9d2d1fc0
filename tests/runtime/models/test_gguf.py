"""GGUF files: slices equal gguf's own dequantisation of whole tensors, with q and k rows in transformers' order."""

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from models_factory import QUANT_TYPES, make_gguf, make_model
from transformers import LlamaForCausalLM

from kvshard.runtime.models.checkpoint import Checkpoint, open_checkpoint
from kvshard.runtime.models.checkpoint_index import CheckpointIndex, read_index
from kvshard.runtime.models.fields import CheckpointError
from kvshard.runtime.models.gguf_file import read_header
from kvshard.runtime.models.spec import FrequencyFactors, LinearScaling, RotarySpec
from kvshard.runtime.models.tensor_info import TensorInfo

HEAD_DIM = 16  # so that a head's columns start inside a block of 32


def whole_tensors(
    path: Path, head_dim: int, wanted: Callable[[str], bool] = lambda _: True
) -> dict[str, np.ndarray]:
    """By GGUF name, dequantised as a whole; of each q and k head row 2i becomes row i, row 2i + 1 row i + half."""
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if not wanted(tensor.name):
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if "attn_q." in tensor.name or "attn_k." in tensor.name:
            order = [*range(0, head_dim, 2), *range(1, head_dim, 2)]
            rows = [head + row for head in range(0, len(values), head_dim) for row in order]
            values = values[rows]
        tensors[tensor.name] = values
    return tensors


def test_the_demo_model_is_described(demo_model: Path) -> None:
    """The figures of the model card's config.json."""
    spec = read_index(demo_model).spec
    assert (spec.hidden_size, spec.num_layers, spec.num_q_heads, spec.num_kv_heads) == (576, 30, 9, 3)
    assert (spec.head_dim, spec.intermediate_size, spec.vocab_size) == (64, 1536, 49152)
    assert spec.rotary == RotarySpec(100000.0, 64)
    assert spec.rms_norm_eps == pytest.approx(1e-5)
    assert (spec.tie_embeddings, spec.max_position_embeddings) == (True, 8192)
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))


def test_the_demo_model_is_read_exactly(demo_model: Path) -> None:
    compared = ("blk.0.", "blk.17.", "blk.29.", "output")
    whole = whole_tensors(demo_model, 64, lambda name: name.startswith(compared))
    checkpoint = open_checkpoint(demo_model)
    attention = "model.layers.17.self_attn."
    mlp = "model.layers.29.mlp."
    for name, gguf_name in (
        (attention + "q_proj.weight", "blk.17.attn_q.weight"),
        (attention + "k_proj.weight", "blk.17.attn_k.weight"),
        (attention + "v_proj.weight", "blk.17.attn_v.weight"),
        (attention + "o_proj.weight", "blk.17.attn_output.weight"),
        (mlp + "gate_proj.weight", "blk.29.ffn_gate.weight"),
        (mlp + "up_proj.weight", "blk.29.ffn_up.weight"),
        (mlp + "down_proj.weight", "blk.29.ffn_down.weight"),
        ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ):
        np.testing.assert_array_equal(checkpoint.read(name).numpy(), whole[gguf_name])
    heads = checkpoint.read(attention + "q_proj.weight", 0, range(64, 192)).numpy()
    np.testing.assert_array_equal(heads, whole["blk.17.attn_q.weight"][64:192])
    columns = checkpoint.read(mlp + "down_proj.weight", 1, range(672, 1536)).numpy()
    np.testing.assert_array_equal(columns, whole["blk.29.ffn_down.weight"][:, 672:])


def test_weights_equal_what_transformers_loads(tmp_path: Path) -> None:
    """The order of q and k rows is right, not only consistent with our writer: transformers undoes it by its own code."""
    path = make_gguf(tmp_path / "model.gguf", make_model(head_dim=HEAD_DIM), "F32")
    reference = LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    checkpoint = open_checkpoint(path)
    assert checkpoint.index.tensors.keys() == reference.keys()
    for name, tensor in reference.items():
        assert torch.equal(checkpoint.read(name), tensor), name


@pytest.mark.parametrize("stored", QUANT_TYPES)
def test_every_slice_equals_the_whole(stored: str, tmp_path: Path) -> None:
    model = make_model(head_dim=HEAD_DIM)
    path = make_gguf(tmp_path / "model.gguf", model, stored)
    whole = whole_tensors(path, HEAD_DIM)
    checkpoint = open_checkpoint(path)
    assert not checkpoint.spec.tie_embeddings
    for name, original in model.state_dict().items():
        info = checkpoint.index.tensors[name]
        gguf_name = next(key for key, value in header_names(path, checkpoint).items() if value == name)
        expected = torch.from_numpy(whole[gguf_name].copy())
        torch.testing.assert_close(expected, original, rtol=0.1, atol=0.15)  # the file is this model
        for axis in range(len(info.shape)):
            for indices in (range(info.shape[axis]), range(HEAD_DIM, 3 * HEAD_DIM)):
                part = checkpoint.read(name, axis, indices)
                assert torch.equal(part.float(), expected.narrow(axis, indices.start, len(indices)))


def header_names(path: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """GGUF name -> Hugging Face name, matched by where the tensor lies."""
    by_offset = {info.offset: name for name, info in checkpoint.index.tensors.items()}
    return {info.name: by_offset[info.offset] for info in read_header(path).tensors}


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # random bytes make scales of inf and NaN
@pytest.mark.parametrize(
    "stored", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "Q8_0"]
)
def test_column_slices_of_large_blocks(stored: str, tmp_path: Path) -> None:
    """Columns that start and end inside blocks; only covering blocks are read. Bytes are random."""
    kind = GGMLQuantizationType[stored]
    block, block_bytes = gguf.constants.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (6, 1024 // block * block_bytes), dtype=np.uint8)
    (tmp_path / "raw").write_bytes(b"#" * 5 + data.tobytes())
    spec = read_index(make_gguf(tmp_path / "any.gguf", make_model(head_dim=HEAD_DIM))).spec
    info = TensorInfo("w", (6, 1024), stored, "raw", 5)
    checkpoint = Checkpoint(CheckpointIndex(tmp_path, spec, {"w": info}))
    whole = gguf.quants.dequantize(data, kind)
    part = checkpoint.read("w", 1, range(300, 700)).numpy()
    np.testing.assert_array_equal(part, whole[:, 300:700])
    blocks = -(-700 // block) - 300 // block
    assert checkpoint.bytes_read == 6 * blocks * block_bytes


def test_rows_that_cut_a_head_are_our_bug(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_gguf(tmp_path / "model.gguf", make_model(head_dim=HEAD_DIM)))
    with pytest.raises(AssertionError, match="cuts a head"):
        checkpoint.read("model.layers.0.self_attn.q_proj.weight", 0, range(8, 24))


def test_rope_factors_of_the_file_are_used(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    path = make_gguf(tmp_path / "model.gguf", make_model(head_dim=HEAD_DIM), rope_factors=factors)
    spec = read_index(path).spec
    assert spec.rotary.scaling == FrequencyFactors(tuple(factors.tolist()))


def test_rope_scaling_of_the_metadata_is_used_or_refused(tmp_path: Path) -> None:
    model, kinds = make_model(head_dim=HEAD_DIM), gguf.RopeScalingType
    linear = make_gguf(tmp_path / "linear.gguf", model, rope_scaling=(kinds.LINEAR, 4.0))
    assert read_index(linear).spec.rotary.scaling == LinearScaling(4.0)
    yarn = make_gguf(tmp_path / "yarn.gguf", model, rope_scaling=(kinds.YARN, 4.0))
    with pytest.raises(
        CheckpointError,
        match=r"llama\.rope\.scaling\.type='yarn' is not supported; supported: 'none' or 'linear'",
    ):
        read_index(yarn)


def test_tied_embeddings_are_those_without_an_output_matrix(tmp_path: Path) -> None:
    model = make_model(head_dim=HEAD_DIM, tie_word_embeddings=True)
    index = read_index(make_gguf(tmp_path / "model.gguf", model, "BF16"))
    assert index.spec.tie_embeddings


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", make_model(head_dim=HEAD_DIM), "Q8_0")


def changed(small: Path, folder: Path, old: bytes, new: bytes) -> Path:
    """A copy with the first occurrence of `old` replaced by `new`, of the same length."""
    data = small.read_bytes()
    assert old in data
    assert len(old) == len(new)
    path = folder / "changed.gguf"
    path.write_bytes(data.replace(old, new, 1))
    return path


def test_a_file_cut_anywhere_is_reported_as_such(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    header_bytes = read_header(small).num_bytes
    path = tmp_path / "cut.gguf"
    for length in (5, 20, 24, 60, header_bytes // 2, header_bytes - 40):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=f"cut short inside its header: .* the file has {length}"):
            read_index(path)
    end = max(info.offset + info.num_bytes for info in read_header(small).tensors)
    path.write_bytes(data[: end - 1])
    with pytest.raises(
        CheckpointError, match=r"cut short: its tensors need \d+ bytes, the file has \d+; affected: "
    ):
        read_index(path)


def test_what_is_no_gguf_is_refused(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "zip.gguf"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        read_index(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        read_index(path)
    with pytest.raises(CheckpointError, match="GGUF version 9 is not supported"):
        read_index(changed(small, tmp_path, b"GGUF\x03", b"GGUF\x09"))
    directory = shutil.copytree(small.parent, tmp_path / "as_directory")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_index(Path(directory))


def test_other_architectures_types_and_names_are_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="architecture 'mamba' is not supported; supported in GGUF files: llama"
    ):
        read_index(changed(small, tmp_path, b"llama", b"mamba"))
    name, q8, iq4 = b"blk.0.attn_v.weight", GGMLQuantizationType.Q8_0, GGMLQuantizationType.IQ4_NL
    dims = (2).to_bytes(4, "little") + (96).to_bytes(8, "little") + (48).to_bytes(8, "little")
    record = name + dims + int(q8).to_bytes(4, "little")
    with pytest.raises(
        CheckpointError, match=r"blk\.0\.attn_v\.weight is stored as IQ4_NL, which is not supported"
    ):
        read_index(changed(small, tmp_path, record, name + dims + int(iq4).to_bytes(4, "little")))
    with pytest.raises(CheckpointError) as error:
        read_index(changed(small, tmp_path, name, b"blk.0.attn_w.weight"))
    assert str(error.value).endswith(
        "missing tensors: model.layers.0.self_attn.v_proj.weight; unexpected tensors: blk.0.attn_w.weight"
    )
    fewer = dims.replace((48).to_bytes(8, "little"), (32).to_bytes(8, "little"))
    with pytest.raises(
        CheckpointError, match=r"wrong shapes: .*v_proj\.weight is \[32, 96\], not \[48, 96\]"
    ):
        read_index(changed(small, tmp_path, record, name + fewer + int(q8).to_bytes(4, "little")))


def test_an_alignment_of_nothing_is_refused(small: Path, tmp_path: Path) -> None:
    kind, two, nothing = ((n).to_bytes(4, "little") for n in (4, 2, 0))  # 4: an unsigned 32-bit value
    path = changed(small, tmp_path, b"llama.block_count" + kind + two, b"general.alignment" + kind + nothing)
    with pytest.raises(CheckpointError, match=r"damaged GGUF header: general\.alignment=0"):
        read_index(path)


def test_a_missing_field_is_named(small: Path, tmp_path: Path) -> None:
    path = changed(small, tmp_path, b"llama.block_count", b"llama.block_kount")
    with pytest.raises(CheckpointError, match=r"llama\.block_count is missing"):
        read_index(path)

"""`kvshard plan` on a job file, with a model of headers only."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from kvshard.launch.plan_command import parse_sizes, plan
from kvshard.runtime.errors import ConfigError
from kvshard.runtime.models.families import spec_from_config
from kvshard.runtime.models.fields import Fields
from kvshard.runtime.models.parameters import expected_tensors

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job whose model has real headers, and a hole where the weights would be."""
    folder = tmp_path / "model"
    folder.mkdir()
    config: dict[str, Any] = SIZES | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, shape in expected_tensors(spec_from_config(Fields("test", config), Fields("", {}))).items():
        size = 2 * (shape[0] * shape[1] if len(shape) == 2 else shape[0])
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    path = tmp_path / "job.yaml"
    path.write_text(
        "model: ./model\ntensor_parallel_size: 2\ndevice: cpu\ndtype: float32\ncache: {num_blocks: 9}\n"
    )
    return path


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(plan)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_json(job: Path) -> None:
    result = invoke(str(job), "--json", "--device-memory", "4GiB")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["fits"] is True
    assert (values["num_tokens"], values["longest_request"], values["max_model_len"]) == (128, 128, 512)
    assert [shard["num_kv_heads"] for shard in values["shards"]] == [1, 1]
    assert [shard["kv_bytes_per_token"] for shard in values["shards"]] == [2 * 2 * 1 * 16 * 4] * 2
    assert [shard["usable_bytes"] for shard in values["shards"]] == [2 * 2**30] * 2


def test_layers_with_a_window(job: Path) -> None:
    """Mistral's layers are Llama's but for the window. 8 rows hold 5 blocks each, as does one prefix; 4 are for a chunk."""
    path = job.parent / "model" / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "mistral", "sliding_window": 64}
    path.write_text(json.dumps(config | {"architectures": ["MistralForCausalLM"]}))
    sizes = "scheduler={max_num_seqs: 8, max_num_batched_tokens: 64}"
    result = invoke(str(job), "--set", "cache.num_blocks=99", "--set", sizes)
    assert result.exit_code == 0, result.output
    assert "2 layer(s) that see 64 tokens: 50 blocks" in result.output
    assert "longest request 512 of 512 tokens" in result.output


def test_table(job: Path) -> None:
    result = invoke(str(job), "--device-memory", "4GiB,5GiB")
    assert result.exit_code == 0, result.output
    for part in ("model on 2 x cpu, MiB", "256", "9 blocks of 16 tokens", "128 tokens", "fits", "2,560"):
        assert part in result.stdout


def test_exit_code_2_when_it_does_not_fit(job: Path) -> None:
    result = invoke(str(job), "--device-memory", "10MB")
    assert result.exit_code == 2
    assert "does not fit" in result.stdout
    assert "raise tensor_parallel_size=2 (up to 4)" in result.stdout


def test_set_changes_the_plan(job: Path) -> None:
    result = invoke(
        str(job), "--json", "--set", "cache.num_blocks=20", "--set", "device=cuda", "--device-memory", "80GiB"
    )
    assert json.loads(result.stdout)["num_blocks"] == 20


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("80GiB", [80 * 2**30]), ("80gb, 1.5 KiB", [80 * 10**9, 1536]), ("4096", [4096])],
)
def test_sizes(text: str, sizes: list[int]) -> None:
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "80 apples", "-1GiB", "80GiB,", "0"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="80GiB"):
        parse_sizes(text)


def test_hub_model_needs_only_its_config(job: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def fetch(repository: str, filename: str, revision: str | None) -> str:
        asked.append((repository, filename, revision))
        return str(tmp_path / "model" / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    result = invoke(str(job), "--json", "--set", "model=owner/name", "--device-memory", "4GiB")
    assert result.exit_code == 0, result.output
    assert asked == [("owner/name", "config.json", None)]

"""The shipped job file that uses many features at once, and the model that is written for it, as the README has them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import environment, read_output

from kvshard.parallel.shard_map import ShardMap
from kvshard.runtime.config import load_config
from kvshard.runtime.models.checkpoint_index import read_index

CONFIGS = Path(__file__).parents[2] / "configs"
JOB = CONFIGS / "everything.yaml"


@pytest.fixture(scope="module")
def model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("everything") / "tiny-gemma3"
    subprocess.run(
        [sys.executable, "-m", "kvshard.configs.tiny_gemma3", str(folder)],
        check=True,
        timeout=120,
        env=environment(),
    )
    return folder


def test_the_job_uses_them_all(model: Path) -> None:
    job = load_config(JOB)
    assert (job.tensor_parallel_size, job.cache.dtype, job.cache.prefix_caching) == (3, "int4", True)
    assert job.sampling.n == 2
    assert 0 not in (job.sampling.presence_penalty, job.sampling.frequency_penalty)
    assert job.sampling.repetition_penalty != 1
    assert job.sampling.stop
    spec = read_index(model).spec
    assert spec.layer_windows == (32,) * 5 + (None,)
    assert [len(shard.q_heads) for shard in ShardMap.build(spec.dims, 3).shards] == [1, 2, 1]


def test_it_runs(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "everything.jsonl"
    command = [sys.executable, "-m", "kvshard", "run", str(JOB)]
    for setting in (f"model={model}", f"output.path={output}", "device=cpu"):
        command += ["--set", setting]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=environment(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_output(output)
    assert len(rows) == 32
    choices = [line["response"]["body"]["choices"] for line in rows.values()]
    assert all([choice["index"] for choice in both] == [0, 1] for both in choices)
    assert all(both[0]["token_ids"] != both[1]["token_ids"] for both in choices)
    reasons = {choice["stop_reason"] for both in choices for choice in both}
    assert reasons >= {".", "ing", None}
    for choice in (choice for both in choices for choice in both):
        assert not re.search(r"\.|ing", choice["message"]["content"])
    for heads in ("2q 1kv", "1q 1kv"):
        assert heads in done.stdout
    found = re.search(r"Prefix cache +([\d,]+) of", done.stdout)
    assert found is not None
    assert int(found[1].replace(",", "")) > 0
    assert not re.search(r"\b0 chunked prompts", done.stdout)

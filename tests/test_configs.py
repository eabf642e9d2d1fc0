"""Every shipped job file parses, is commented, and is planned to fit the hardware its first lines name."""

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from kvshard.parallel.shard_map import ShardMap
from kvshard.runtime.batch.records import Row, read_rows
from kvshard.runtime.config import load_config
from kvshard.runtime.errors import ConfigError
from kvshard.runtime.models.spec import ModelSpec, RotarySpec
from kvshard.runtime.observe.memory_plan import plan_memory

CONFIGS = Path(__file__).parent.parent / "configs"
JOBS = sorted(CONFIGS.glob("*.yaml"))
GIB = 2**30


def llama(hidden: int, layers: int, q_heads: int, intermediate: int) -> ModelSpec:
    """Llama 3.1's sizes, from its published configs."""
    return ModelSpec(
        architecture="LlamaForCausalLM",
        hidden_size=hidden,
        num_layers=layers,
        num_q_heads=q_heads,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        vocab_size=128256,
        layer_windows=(None,) * layers,
        rms_norm_eps=1e-5,
        rotary=RotarySpec(theta=5e5, rotary_dim=128),
        tie_embeddings=False,
        max_position_embeddings=131072,
        eos_token_ids=(128001,),
        bos_token_id=128000,
    )


LLAMA_8B = llama(4096, 32, 32, 14336)
LLAMA_70B = llama(8192, 80, 64, 28672)


def test_all_purposes_are_there() -> None:
    assert {path.stem for path in JOBS} == {
        "quickstart",
        "one_gpu_8b",
        "eight_gpus_70b",
        "mixed_gpus",
        "two_nodes",
        "long_context",
        "score",
        "everything",
    }


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_job_file(path: Path) -> None:
    config = load_config(path)
    assert config.input is not None
    assert config.output is not None
    uncommented = [
        line
        for line in path.read_text().splitlines()
        if re.match(r"\s*\w+: *\S", line) and not line.lstrip().startswith("#") and "#" not in line
    ]
    assert not uncommented, "every field says what it is"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_misspelt_key_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean scheduler\.max_num_seqs"):
        load_config(path, {"scheduler.max_num_seq": 4})


@pytest.mark.parametrize(
    ("name", "spec", "gib", "kv_heads"),
    [
        ("one_gpu_8b", LLAMA_8B, 24, [8]),
        ("eight_gpus_70b", LLAMA_70B, 80, [1] * 8),
        ("mixed_gpus", LLAMA_8B, [80, 40], [5, 3]),
        ("two_nodes", LLAMA_70B, 80, [1] * 8),
        ("long_context", LLAMA_8B, 80, [2] * 4),
    ],
)
def test_fits_the_hardware_it_is_for(name: str, spec: ModelSpec, gib: Any, kv_heads: list[int]) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    shard_map = ShardMap.build(spec.dims, config.tensor_parallel_size, config.shard_weights)
    memory = [size * GIB for size in gib] if isinstance(gib, list) else gib * GIB
    plan = plan_memory(config, spec, shard_map, "cuda", memory)
    assert plan.problem is None
    assert plan.longest_request == config.scheduler.max_model_len
    assert [shard.num_kv_heads for shard in plan.shards] == kv_heads
    stated = f"{gib}GiB" if isinstance(gib, int) else ",".join(f"{size}GiB" for size in gib)
    assert f"--device-memory {stated}\n" in (CONFIGS / f"{name}.yaml").read_text()


def test_quickstart_prompts() -> None:
    path = load_config(CONFIGS / "quickstart.yaml").input
    assert path is not None
    rows = [json.loads(line) for line in Path(path.path).read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 32
    assert len({row["id"] for row in rows}) == 32
    assert len({row["messages"][-1]["content"] for row in rows}) == 32


def test_score_texts() -> None:
    config = load_config(CONFIGS / "score.yaml")
    assert config.input is not None
    rows = list(read_rows([Path(config.input.path)], config.sampling))
    assert len(rows) == 8
    assert all(isinstance(row, Row) and not row.sampling.only_to_generate for row in rows)


def test_ray_cluster() -> None:
    cluster = yaml.safe_load((CONFIGS / "cluster/ray_cluster.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(cluster)))  # Ray's own schema
    assert cluster["provider"]["type"] == "local"
    assert cluster["min_workers"] == cluster["max_workers"] == len(cluster["provider"]["worker_ips"])
    [head] = [command for command in cluster["head_start_ray_commands"] if "--head" in command]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head, "else no worker is ever started"
    assert any("$RAY_HEAD_IP" in command for command in cluster["worker_start_ray_commands"])


def test_rayjob_has_the_gpus_its_job_asks_for() -> None:
    job = yaml.safe_load((CONFIGS / "cluster/kuberay_rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    [workers] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    [container] = workers["template"]["spec"]["containers"]
    volumes = {volume["name"] for volume in workers["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    num_gpus = workers["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert num_gpus == load_config(CONFIGS / "two_nodes.yaml").tensor_parallel_size
    assert job["spec"]["entrypoint"].startswith("kvshard run ")


def test_slurm_script_is_valid_shell() -> None:
    script = CONFIGS / "cluster/slurm_torchrun.sh"
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    text = script.read_text()
    nodes, gpus = (int(re.search(rf"{key}=(\d+)", text)[1]) for key in ("--nodes", "--gpus-per-node"))  # type: ignore[index]
    assert nodes * gpus == load_config(CONFIGS / "two_nodes.yaml").tensor_parallel_size
    assert f"--nproc-per-node={gpus}" in text
    assert re.search(r"^srun .*--cpus-per-task=", text, re.MULTILINE), "else each host has one core"
    assert "KVSHARD_" not in text, "no environment variables of our own"

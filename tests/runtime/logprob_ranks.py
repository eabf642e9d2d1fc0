"""What each rank of tests/runtime/test_prompt_logprobs.py runs: the real coordinator and worker, without sockets.

The scheduler decides by requests and limits alone, so the coordinators of all ranks send the same plans.
"""

from collections import deque
from pathlib import Path
from typing import Any

from ranks import connect
from torch.distributed import Store

from kvshard.parallel.group import Group
from kvshard.parallel.shard_map import ShardMap
from kvshard.runtime.config import parse_config
from kvshard.runtime.coordinator.limits import Limits
from kvshard.runtime.coordinator.loop import Coordinator
from kvshard.runtime.coordinator.plan import (
    StepPlan,
    StepResult,
    decode_plan,
    decode_result,
    encode_plan,
    encode_result,
)
from kvshard.runtime.coordinator.request import Request
from kvshard.runtime.models.checkpoint import open_checkpoint
from kvshard.runtime.shard.worker import Worker

BLOCK_SIZE = 4
MAX_MODEL_LEN = 48


class OneRank:
    """Runs a plan when its result is asked for; what was not written before is NaN."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._plans: deque[bytes] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(encode_plan(plan))

    def result(self) -> StepResult:
        return decode_result(encode_result(self.worker.run(decode_plan(self._plans.popleft())).wait()))


def make_coordinator(path: Path, group: Group, num_blocks: int, settings: dict[str, Any]) -> Coordinator:
    """In float32, with `settings` over those of the job file."""
    config = parse_config(
        {
            "model": str(path),
            "tensor_parallel_size": group.world_size,
            "device": "cpu",
            "dtype": "float32",
            "cache": {"block_size": BLOCK_SIZE, **settings.get("cache", {})},
            "scheduler": {"max_num_seqs": 3, "max_num_batched_tokens": 8, **settings.get("scheduler", {})},
        },
        "test",
    )
    with open_checkpoint(path) as checkpoint:
        shard_map = ShardMap.build(checkpoint.spec.dims, group.world_size)
        worker = Worker(config, checkpoint, shard_map, group, MAX_MODEL_LEN)
    worker.allocate(num_blocks)
    worker.cache.fill(float("nan"))
    limits = Limits.from_config(
        config,
        num_blocks=num_blocks,
        max_model_len=MAX_MODEL_LEN,
        layer_groups=worker.spec.layer_groups,
    )
    return Coordinator(OneRank(worker), limits)  # type: ignore[arg-type]


def run_requests(coordinator: Coordinator, requests: list[Request]) -> list[Request]:
    for request in requests:
        coordinator.add(request)
    while coordinator.has_work:
        coordinator.step()
        coordinator.check_integrity()
    return requests


def answer(
    store: Store, rank: int, world_size: int, path: Path, requests: list[Request], num_blocks: int
) -> list[Request]:
    return run_requests(make_coordinator(path, connect(store, rank, world_size), num_blocks, {}), requests)

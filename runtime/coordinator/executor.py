"""The seam between the coordinator and whatever runs its plans."""

from dataclasses import dataclass
from typing import Protocol

from .plan import StepPlan, StepResult


@dataclass(frozen=True)
class ShardInfo:
    """What a running shard says of itself once its weights and cache are in place."""

    rank: int
    host: str
    pid: int
    device: str
    num_q_heads: int
    num_kv_heads: int
    weight_bytes: int  # storages of its parameters, aliases counted once
    kv_bytes: int  # storages of its K and V tensors
    num_layer_blocks: int  # blocks of its cache, each layer's counted for itself; equal on all ranks
    group_backend: str  # single, shared_memory, gloo or nccl
    threads: int


@dataclass(frozen=True)
class ShardHealth:
    """A shard's answer to "are you there?", given by a thread that no step can block."""

    rank: int
    last_step_id: int
    peak_memory_bytes: int  # host: peak resident set; CUDA: peak allocated


class Executor(Protocol):
    """Runs plans in order on every shard; the only thing the coordinator talks to."""

    def launch(self) -> None:
        """Start the shards' processes, without waiting for what they import. Raises ConfigError or ShardError."""

    def start(self) -> list[ShardInfo]:
        """Return when all shards are ready; launches them where that was not done. Raises ConfigError or ShardError."""

    def submit(self, plan: StepPlan) -> None:
        """Send one plan to every shard; returns at once."""

    def result(self) -> StepResult:
        """The oldest submitted plan's result. Raises ShardError when a shard fails or is late."""

    def health(self) -> list[ShardHealth]:
        """One answer a shard that answered in time."""

    def stacks(self) -> dict[int, str]:
        """The Python stacks of every shard that answers, by rank."""

    def close(self) -> None:
        """Stop the shards and free what they held; safe to call twice and after a failure."""

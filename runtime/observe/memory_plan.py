"""Does the job fit? Worked out from the config and the model's sizes alone, before a byte of weights is read.

Per shard, in bytes:

    weights   = storage of its parameters, aliases once: numbers, or blocks of codes  (exact)
    KV        = sum over layer groups of blocks * block_size * 2 * layers * local KV heads * row  (exact)
      blocks  = num_blocks; in a group whose layers have a window at most what its rows can hold (coordinator/limits.py):
                (max_num_seqs + max(max_num_seqs // 8, 1)) * (ceil(window / block_size) + 1)
                  + ceil(max_num_batched_tokens / block_size) + 1      without prefix caching max_num_seqs alone
      row         = head_dim * dtype; with cache.dtype int8 or fp8 head_dim + 2, with int4 head_dim / 2 + 2: codes and scale
    reserve   = activations + graphs + logits + seen + rotary tables + runtime            (stated, not measured)
      activations = max_num_batched_tokens * dtype * (4 * hidden + 2 * (q + 2 kv) * head_dim + 3 * MLP columns)
      graphs      = one shard on CUDA with `cuda_graphs`: max_num_seqs * dtype * (the same) + attention's partial results,
                    (2,048 + max_num_seqs) * KV heads * max(16, 2 * query heads of each) * head_dim * 4
      logits      = max_num_seqs * vocabulary rows * (dtype + 34)     raw, float32 copies, room for sampling in torch; 6 of
                    it are counts and masks of penalties and allowed tokens, made when the first request asks for them
      seen        = max_num_seqs * min(vocabulary rows, 2 * longest request) * 28     tokens to penalise, and room for it
      rotary      = longest request * 2 * sum of rotary_dim * 4       cos and sin, float32, of every kind of layer
      runtime     = CUDA: 512 MiB context, 512 MiB libraries' work space and attention's partial results, 512 MiB NCCL when
                    there are more shards; CPU: 256 MiB, and 64 MiB with `quantization` (what codes become in long steps)

with heads, columns and rows of the largest shard, since collectives are padded to it. What is left of
`memory_fraction * memory` after weights and reserve holds the blocks; the smallest num_blocks over the ranks counts for all.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ...parallel.shard_map import ShardMap
from ..config import CacheConfig, JobConfig
from ..coordinator.limits import Limits
from ..errors import ConfigError
from ..models.parameters import weight_bytes
from ..models.spec import ModelSpec
from ..models.weight_formats import WeightFormats
from ..shard.buckets import GRAPH_CHUNKS
from .cache_size import DTYPE_BYTES, cache_row_bytes, choose_num_blocks, fitting_blocks

DeviceKind = Literal["cpu", "cuda"]
MIN_BLOCKS = 2  # block 0 is never allocated, so one block is left to use

_MIB = 2**20


@dataclass(frozen=True)
class ShardPlan:
    """What one shard holds, in bytes unless named otherwise."""

    rank: int
    num_q_heads: int
    num_kv_heads: int
    weight_bytes: int
    kv_bytes_per_token: int  # inside every window
    kv_bytes: int
    reserve_bytes: int
    usable_bytes: int | None  # memory_fraction * memory; None when the memory is not known

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.reserve_bytes


@dataclass(frozen=True)
class GroupPlan:
    """The layers with one window."""

    window: int | None  # tokens; None = full attention
    num_layers: int
    num_blocks: int  # on every rank, the never allocated block 0 included


@dataclass(frozen=True)
class MemoryPlan:
    """What every shard agrees on, and why it cannot work if it cannot."""

    device_kind: DeviceKind
    dtype: str
    quantization: str
    cache_dtype: str
    block_size: int  # tokens
    num_blocks: int  # of the groups that no window limits
    groups: tuple[GroupPlan, ...]
    max_model_len: int  # tokens of the longest request, prompt and output
    longest_request: int  # tokens of the longest one that can run, alone if need be
    shards: tuple[ShardPlan, ...]
    problem: str | None  # which setting to change; None when it fits

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache holds."""
        return max(0, self.num_blocks - 1) * self.block_size

    def require_fit(self) -> None:
        """Raises ConfigError when the job does not fit."""
        if self.problem is not None:
            raise ConfigError(self.problem)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        shards = [asdict(shard) | {"total_bytes": shard.total_bytes} for shard in self.shards]
        return asdict(self) | {"fits": self.problem is None, "num_tokens": self.num_tokens, "shards": shards}


def resolve_dtype(dtype: str, device_kind: DeviceKind) -> str:
    """The dtype of weights and activations: `auto` is bfloat16 on cuda and float32 on cpu."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device_kind == "cuda" else "float32"


def build_shard_map(config: JobConfig, spec: ModelSpec) -> ShardMap:
    """Who owns what in this job. Raises ConfigError when there are more shards than heads."""
    try:
        return ShardMap.build(spec.dims, config.tensor_parallel_size, config.shard_weights)
    except ValueError as error:  # it names the settings, but cannot know this package's errors
        raise ConfigError(str(error)) from None


def plan_memory(
    config: JobConfig,
    spec: ModelSpec,
    shard_map: ShardMap,
    device_kind: DeviceKind,
    device_memory_bytes: int | Sequence[int] | None,
    formats: WeightFormats | None = None,
) -> MemoryPlan:
    """The plan of a job. Never raises for a job that does not fit: see `MemoryPlan.problem`.

    `device_memory_bytes` is what one rank may count on before `memory_fraction`: a device's memory, or on CPU the
    host's divided by its shards; one number for all, one a rank, or None when it is not known (then nothing is
    checked against it, and without `cache.num_blocks` the cache gets all blocks that can be of use). `formats` are the
    checkpoint's; without them nothing is known of blocks that are kept.
    """
    world_size = shard_map.world_size
    dtype = resolve_dtype(config.dtype, device_kind)
    cache_dtype = dtype if config.cache.dtype == "auto" else config.cache.dtype
    fraction = memory_fraction(config.cache, device_kind)
    memories = _per_rank(device_memory_bytes, world_size)
    longest = config.scheduler.max_model_len or spec.max_position_embeddings
    reserve = reserve_bytes(config, spec, shard_map, device_kind)

    formats = formats or WeightFormats(config.quantization)
    weights = [weight_bytes(spec, shard, DTYPE_BYTES[dtype], formats) for shard in shard_map.shards]
    row_bytes = cache_row_bytes(cache_dtype, spec.head_dim)
    per_token = [shard_map.kv_bytes_per_token(rank, row_bytes) for rank in range(world_size)]
    usable = [None if memory is None else int(fraction * memory) for memory in memories]
    limits = Limits.from_config(
        config, num_blocks=MIN_BLOCKS, max_model_len=longest, layer_groups=spec.layer_groups
    )
    # Of one layer, one block each.
    block_bytes = [token_bytes // spec.num_layers * config.cache.block_size for token_bytes in per_token]
    fitting = [
        fitting_blocks(max(0, room - held - reserve) // one_block, limits)
        for room, held, one_block in zip(usable, weights, block_bytes, strict=True)
        if room is not None
    ]
    most_blocks = min(fitting, default=None)
    num_blocks = choose_num_blocks(config.cache, max(limits.most_blocks), most_blocks)
    limits = replace(limits, num_blocks=num_blocks)
    shards = tuple(
        ShardPlan(
            rank=rank,
            num_q_heads=len(shard.q_heads),
            num_kv_heads=len(shard.kv_heads),
            weight_bytes=weights[rank],
            kv_bytes_per_token=per_token[rank],
            kv_bytes=block_bytes[rank] * limits.num_layer_blocks,
            reserve_bytes=reserve,
            usable_bytes=usable[rank],
        )
        for rank, shard in enumerate(shard_map.shards)
    )
    return MemoryPlan(
        device_kind=device_kind,
        dtype=dtype,
        quantization=config.quantization,
        cache_dtype=cache_dtype,
        block_size=config.cache.block_size,
        num_blocks=num_blocks,
        groups=tuple(
            GroupPlan(group.window, group.num_layers, count)
            for group, count in zip(spec.layer_groups, limits.group_blocks, strict=True)
        ),
        max_model_len=longest,
        longest_request=limits.longest_request,
        shards=shards,
        problem=_problem(config, spec, shards, limits, most_blocks, fraction, memories),
    )


def memory_fraction(cache: CacheConfig, device_kind: DeviceKind) -> float:
    """The share of a device's memory that a shard may use."""
    if cache.memory_fraction is not None:
        return cache.memory_fraction
    return 0.9 if device_kind == "cuda" else 0.5


def reserve_bytes(config: JobConfig, spec: ModelSpec, shard_map: ShardMap, device_kind: DeviceKind) -> int:
    """Work space of any shard besides weights and cache, by the formula at the top of this file."""
    scheduler = config.scheduler
    dtype_bytes = DTYPE_BYTES[resolve_dtype(config.dtype, device_kind)]
    qkv_heads = max(len(shard.q_heads) + 2 * len(shard.kv_heads) for shard in shard_map.shards)
    mlp_columns = max(len(shard.mlp_columns) for shard in shard_map.shards)
    vocab_rows = max(len(shard.vocab_rows) for shard in shard_map.shards)
    token_elements = 4 * spec.hidden_size + 2 * qkv_heads * spec.head_dim + 3 * mlp_columns
    activations = scheduler.max_num_batched_tokens * token_elements * dtype_bytes
    graphs = 0
    if device_kind == "cuda" and config.cuda_graphs and shard_map.world_size == 1:
        partials = (GRAPH_CHUNKS + scheduler.max_num_seqs) * spec.num_kv_heads * spec.head_dim
        tile_rows = max(16, 2 * spec.num_q_heads // spec.num_kv_heads)
        graphs = scheduler.max_num_seqs * token_elements * dtype_bytes + partials * tile_rows * 4
    logits = scheduler.max_num_seqs * vocab_rows * (dtype_bytes + 34)
    longest = scheduler.max_model_len or spec.max_position_embeddings
    seen = scheduler.max_num_seqs * min(vocab_rows, 2 * longest) * 28
    rotary = longest * 2 * sum(rotary.rotary_dim for rotary in spec.rotaries) * 4
    if device_kind == "cuda":
        runtime = 1024 if shard_map.world_size == 1 else 1536
    else:
        runtime = 256 if config.quantization == "none" else 320
    return activations + graphs + logits + seen + rotary + runtime * _MIB


def _per_rank(memory: int | Sequence[int] | None, world_size: int) -> list[int | None]:
    if memory is None or isinstance(memory, int):
        return [memory] * world_size
    if len(memory) != world_size:
        raise ConfigError(
            f"memory is given for {len(memory)} devices and tensor_parallel_size={world_size}; "
            "give one size for all, or one a shard"
        )
    return list(memory)


def _problem(
    config: JobConfig,
    spec: ModelSpec,
    shards: Sequence[ShardPlan],
    limits: Limits,
    most_blocks: int | None,
    fraction: float,
    memories: Sequence[int | None],
) -> str | None:
    """The first reason why the job cannot run: names the setting, both numbers and the way out."""
    wanted_len, num_blocks = config.scheduler.max_model_len, limits.num_blocks
    if wanted_len is not None and wanted_len > spec.max_position_embeddings:
        return (
            f"scheduler.max_model_len={wanted_len} is more than the {spec.max_position_embeddings} positions "
            f"of this model; lower it to {spec.max_position_embeddings} or less"
        )
    more_room = _more_room(config, spec, fraction)
    if most_blocks is not None and (most_blocks < MIN_BLOCKS or num_blocks > most_blocks):
        tightest = min(shards, key=_spare_tokens)
        memory = memories[tightest.rank]
        assert memory is not None, "most_blocks comes from known memory"
        assert tightest.usable_bytes is not None, "known when the memory is"
        allowance = f"{gib(tightest.usable_bytes)} ({fraction:g} of {gib(memory)})"
        held = f"{gib(tightest.weight_bytes)} weights and {gib(tightest.reserve_bytes)} work space"
        if most_blocks < MIN_BLOCKS:
            return (
                f"shard {tightest.rank} needs {held} and may use {allowance}, which leaves no room for a cache: "
                f"{more_room}, or lower scheduler.max_num_batched_tokens={config.scheduler.max_num_batched_tokens}"
            )
        return (
            f"cache.num_blocks={num_blocks} takes {gib(tightest.kv_bytes)} on shard {tightest.rank} besides {held}, "
            f"together {gib(tightest.total_bytes)}, and it may use {allowance}: "
            f"lower cache.num_blocks to {most_blocks} or less, or {more_room}"
        )
    needed = limits.num_blocks_needed(wanted_len) if wanted_len is not None else MIN_BLOCKS
    if num_blocks < needed:
        way_out = f"raise cache.num_blocks to {needed}" if config.cache.num_blocks is not None else more_room
        return (
            f"one request of scheduler.max_model_len={wanted_len} tokens needs {needed} blocks of {limits.block_size} "
            f"(one is never used) and the cache has {num_blocks}: "
            f"lower scheduler.max_model_len to {limits.longest_request} or less, or {way_out}"
        )
    return None


def _spare_tokens(shard: ShardPlan) -> float:
    assert shard.usable_bytes is not None, "only asked when the memory is known"
    return (shard.usable_bytes - shard.weight_bytes - shard.reserve_bytes) / shard.kv_bytes_per_token


def _more_room(config: JobConfig, spec: ModelSpec, fraction: float) -> str:
    size, room = config.tensor_parallel_size, f"cache.memory_fraction={fraction:g}"
    if config.cache.dtype == "auto" or config.quantization == "none":
        room += f", or set {'cache.dtype' if config.cache.dtype == 'auto' else 'quantization'}: int8"
    if size == spec.num_q_heads:
        return f"raise {room}"
    return f"raise tensor_parallel_size={size} (up to {spec.num_q_heads}) or {room}"


def gib(num_bytes: int) -> str:
    """Bytes as people read them."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"

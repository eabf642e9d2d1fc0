"""Who owns which part of a model: pure integers, the same on every rank.

The unit is the head. Whole KV groups (a KV head with its query heads) are dealt where that is fair; else query heads
are, and a KV head lives on every rank that holds one of its query heads. MLP columns and vocabulary rows then even
out the bytes that each rank reads per decode step.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from .dealing import at_least_one, deal, level_out

MLP_UNIT = 32  # MLP columns are dealt 32 at a time: one block of the 32-wide ggml types


@dataclass(frozen=True, slots=True)
class ModelDims:
    """The sizes that decide a share. Whole-model counts; num_q_heads is a multiple of num_kv_heads."""

    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_embeddings: bool

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1 and name != "tie_embeddings":
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads={self.num_q_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's share, as ranges of whole-model indices. Only `mlp_columns` may be empty."""

    rank: int
    q_heads: range
    kv_heads: range
    mlp_columns: range
    vocab_rows: range
    group_size: int

    @property
    def q_per_kv(self) -> tuple[int, ...]:
        """How many query heads this rank holds of each of its KV heads, in order; adds up to len(q_heads)."""
        return tuple(
            min(self.q_heads.stop, (kv_head + 1) * self.group_size)
            - max(self.q_heads.start, kv_head * self.group_size)
            for kv_head in self.kv_heads
        )


Part = Literal["q_heads", "kv_heads", "mlp_columns", "vocab_rows"]
PARTS: tuple[Part, ...] = ("q_heads", "kv_heads", "mlp_columns", "vocab_rows")


@dataclass(frozen=True, slots=True)
class Move:
    """Indices that `destination` lacks. `source` is a rank of the old map, or None: the checkpoint."""

    part: Part
    indices: range
    source: int | None
    destination: int


@dataclass(frozen=True, slots=True)
class ShardMap:
    """The shares of all ranks. Equal inputs give equal maps on every machine (exact fractions, no floats)."""

    dims: ModelDims
    shards: tuple[Shard, ...]

    @classmethod
    def build(cls, dims: ModelDims, world_size: int, weights: Sequence[float] | None = None) -> "ShardMap":
        """Deal the model to `world_size` ranks in proportion to `weights` (default: all equal).

        Raises ValueError if there are more ranks than query heads, or if the weights are not `world_size`
        finite numbers above 0.
        """
        if not 1 <= world_size <= dims.num_q_heads:
            relation = "less than 1" if world_size < 1 else f"more than num_q_heads={dims.num_q_heads}"
            raise ValueError(f"tensor_parallel_size={world_size} is {relation}; use 1 to {dims.num_q_heads}")
        if world_size > dims.vocab_size:
            raise ValueError(f"tensor_parallel_size={world_size} is more than vocab_size={dims.vocab_size}")
        shares = _checked_weights(weights, world_size)

        q_heads = _deal_heads(dims, shares)
        kv_heads = [_kv_heads(dims, run) for run in q_heads]

        loads = [
            Fraction(_attention_elements(dims, len(q), len(kv)))
            for q, kv in zip(q_heads, kv_heads, strict=True)
        ]
        num_units = -(-dims.intermediate_size // MLP_UNIT)
        mlp_elements = _mlp_elements(dims, dims.intermediate_size)
        unit_shares = [
            extra * num_units / mlp_elements for extra in level_out(loads, shares, Fraction(mlp_elements))
        ]
        mlp_columns = [
            range(run.start * MLP_UNIT, min(run.stop * MLP_UNIT, dims.intermediate_size)) if run else range(0)
            for run in deal(num_units, unit_shares)
        ]

        # One row each first (a rank without logits has nothing to give to the sampler), then to level.
        row = dims.hidden_size
        loads = [
            load + _mlp_elements(dims, len(columns)) + row
            for load, columns in zip(loads, mlp_columns, strict=True)
        ]
        spare = Fraction((dims.vocab_size - world_size) * row)
        vocab_rows = deal(dims.vocab_size, [1 + extra / row for extra in level_out(loads, shares, spare)])
        return cls(
            dims,
            tuple(
                Shard(rank, *parts, dims.group_size)
                for rank, parts in enumerate(zip(q_heads, kv_heads, mlp_columns, vocab_rows, strict=True))
            ),
        )

    @property
    def world_size(self) -> int:
        return len(self.shards)

    def shard(self, rank: int) -> Shard:
        return self.shards[rank]

    def owners(self, kv_head: int) -> tuple[int, ...]:
        """The ranks that hold this KV head, in rank order; several when it is replicated."""
        return tuple(shard.rank for shard in self.shards if kv_head in shard.kv_heads)

    def kv_bytes_per_token(self, rank: int, row_bytes: int) -> int:
        """Bytes of K and V that one token takes in this rank's cache, over all layers.

        row_bytes: of one key, or value, of one head.
        """
        return 2 * self.dims.num_layers * len(self.shards[rank].kv_heads) * row_bytes

    def decode_bytes(self, rank: int, dtype_bytes: int) -> int:
        """Weight bytes this rank reads per decode step: qkv, o, gate, up, down and the LM head.

        Left out: norms and the looked-up embedding rows, a few rows on each rank.
        """
        shard = self.shards[rank]
        elements = (
            _attention_elements(self.dims, len(shard.q_heads), len(shard.kv_heads))
            + _mlp_elements(self.dims, len(shard.mlp_columns))
            + len(shard.vocab_rows) * self.dims.hidden_size
        )
        return elements * dtype_bytes

    def replicated_bytes(self, dtype_bytes: int) -> int:
        """Weight bytes that the ranks together hold more than once: K and V rows of replicated KV heads."""
        copies = sum(len(shard.kv_heads) for shard in self.shards) - self.dims.num_kv_heads
        return copies * _attention_elements(self.dims, 0, 1) * dtype_bytes

    def moves(self, other: "ShardMap", *, lost: Collection[int] = ()) -> list[Move]:
        """What each rank of `other` must fetch, given that rank r already holds its share in this map.

        `lost` are ranks of this map whose memory is gone: they hold nothing and give nothing. Each missing
        index comes once, from the lowest rank that holds it, or from None (the checkpoint) if no rank does.
        """
        assert self.dims == other.dims, "moves() compares two maps of the same model"
        alive = [shard for shard in self.shards if shard.rank not in lost]
        moves: list[Move] = []
        for shard in other.shards:
            for part in PARTS:
                holders = [(old.rank, _indices(old, part)) for old in alive]
                held = next((run for rank, run in holders if rank == shard.rank), range(0))
                for missing in _difference(_indices(shard, part), held):
                    for source, run in _by_source(missing, holders):
                        moves.append(Move(part, run, source, shard.rank))
        return moves


def _indices(shard: Shard, part: Part) -> range:
    indices: range = getattr(shard, part)
    return indices


def _checked_weights(weights: Sequence[float] | None, world_size: int) -> list[Fraction]:
    if weights is None:
        return [Fraction(1)] * world_size
    if len(weights) != world_size:
        raise ValueError(
            f"shard_weights has {len(weights)} entries but tensor_parallel_size={world_size}; "
            "give one weight per shard"
        )
    for index, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"shard_weights[{index}]={weight} must be a finite number above 0")
    return [Fraction(weight) for weight in weights]


def _kv_heads(dims: ModelDims, q_heads: range) -> range:
    """Those that these query heads read."""
    return range(q_heads.start // dims.group_size, (q_heads.stop - 1) // dims.group_size + 1)


def _deal_heads(dims: ModelDims, weights: list[Fraction]) -> list[range]:
    """Each rank's query heads: whole KV groups, unless there are more ranks than groups, or unless parts of groups make
    the busiest rank's query heads, for its weight, fewer, and no rank's KV heads more than the most with whole groups,
    for its weight or in number.

    Ranks wait for each other after every attention, so the busiest one's heads are what a layer takes.
    """
    heads = deal(dims.num_q_heads, at_least_one(dims.num_q_heads, weights))
    if len(weights) > dims.num_kv_heads:
        return heads
    groups = deal(dims.num_kv_heads, at_least_one(dims.num_kv_heads, weights))
    whole = [range(run.start * dims.group_size, run.stop * dims.group_size) for run in groups]

    def most(runs: list[range]) -> Fraction:
        return max(len(run) / weight for run, weight in zip(runs, weights, strict=True))

    kv_heads, whole_kv = ([_kv_heads(dims, run) for run in runs] for runs in (heads, whole))
    no_fuller = most(kv_heads) <= most(whole_kv) and max(map(len, kv_heads)) <= max(map(len, whole_kv))
    return heads if no_fuller and most(heads) < most(whole) else whole


def _attention_elements(dims: ModelDims, num_q_heads: int, num_kv_heads: int) -> int:
    """q rows and o columns per query head, k and v rows per KV head."""
    return dims.num_layers * dims.hidden_size * dims.head_dim * (2 * num_q_heads + 2 * num_kv_heads)


def _mlp_elements(dims: ModelDims, num_columns: int) -> int:
    return dims.num_layers * dims.hidden_size * 3 * num_columns


def _difference(wanted: range, held: range) -> Iterator[range]:
    """The at most two runs of `wanted` that lie outside `held`."""
    if not held:
        held = range(wanted.stop, wanted.stop)
    for run in (
        range(wanted.start, min(wanted.stop, held.start)),
        range(max(wanted.start, held.stop), wanted.stop),
    ):
        if run:
            yield run


def _by_source(wanted: range, holders: list[tuple[int, range]]) -> Iterator[tuple[int | None, range]]:
    """Cut `wanted` into the longest runs that one source can give."""
    start = wanted.start
    while start < wanted.stop:
        source = next((rank for rank, run in holders if start in run), None)
        if source is None:
            begins = [run.start for _, run in holders if run and run.start > start]
            stop = min([wanted.stop, *begins])
        else:
            stop = min(wanted.stop, next(run.stop for rank, run in holders if rank == source))
        yield source, range(start, stop)
        start = stop

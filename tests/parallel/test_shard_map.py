"""The dealing rule: every head owned, counts fair, bytes level, moves minimal. Random models, sizes and weights."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshard.parallel.shard_map import MLP_UNIT, PARTS, ModelDims, Shard, ShardMap

DEMO = ModelDims(
    hidden_size=576,
    num_layers=30,
    num_q_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    tie_embeddings=True,
)


@st.composite
def dims_of_any_size(draw: st.DrawFn) -> ModelDims:
    num_kv_heads = draw(st.integers(1, 12))
    return ModelDims(
        hidden_size=draw(st.sampled_from([24, 64, 576, 4096])),
        num_layers=draw(st.integers(1, 40)),
        num_q_heads=num_kv_heads * draw(st.integers(1, 8)),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([8, 24, 64, 128])),
        intermediate_size=draw(st.integers(1, 16000)),
        vocab_size=draw(st.integers(100, 200_000)),
        tie_embeddings=draw(st.booleans()),
    )


@st.composite
def weighted_maps(draw: st.DrawFn) -> tuple[ShardMap, list[float]]:
    dims = draw(dims_of_any_size())
    world_size = draw(st.integers(1, min(dims.num_q_heads, 24)))
    equal = draw(st.booleans())
    weight = st.just(1.0) if equal else st.floats(0.1, 10)
    weights = draw(st.lists(weight, min_size=world_size, max_size=world_size))
    return ShardMap.build(dims, world_size, weights), weights


def covers(runs: list[range], count: int) -> bool:
    """The runs are contiguous, in rank order, and hold each index of range(count) exactly once."""
    return [index for run in runs for index in run] == list(range(count))


def split(shard_map: ShardMap) -> bool:
    """Whether a KV head lives on several ranks."""
    return any(len(shard_map.owners(kv_head)) > 1 for kv_head in range(shard_map.dims.num_kv_heads))


def test_demo_model_on_two_ranks_splits_the_middle_group() -> None:
    shard_map = ShardMap.build(DEMO, 2)
    first, second = shard_map.shards
    assert (first.q_heads, first.kv_heads, first.q_per_kv) == (range(5), range(2), (3, 2))
    assert (second.q_heads, second.kv_heads, second.q_per_kv) == (range(5, 9), range(1, 3), (1, 3))
    assert len(second.mlp_columns) > len(first.mlp_columns), "the rank with fewer heads takes more columns"
    assert shard_map.kv_bytes_per_token(0, 64 * 4) == 2 * 30 * 2 * 64 * 4


@pytest.mark.parametrize(
    ("world_size", "weights", "heads", "kv_heads"),
    [
        (2, None, [16, 16], [4, 4]),
        (3, None, [12, 8, 12], [3, 2, 3]),  # parts of groups would be 11, 10 and 11 of 3, 4 and 3 KV heads
        (6, None, [5, 6, 5, 5, 6, 5], [2, 2, 2, 2, 2, 2]),  # whole groups would be of 8 or 4 heads
        (2, [3.0, 1.0], [24, 8], [6, 2]),
        (2, [2.0, 1.0], [20, 12], [5, 3]),  # 21 and 11 would be 6 and 3 KV heads
    ],
)
def test_groups_are_split_where_that_is_fairer_and_takes_no_more_cache(
    world_size: int, weights: list[float] | None, heads: list[int], kv_heads: list[int]
) -> None:
    shards = ShardMap.build(ModelDims(4096, 32, 32, 8, 128, 14336, 128256, False), world_size, weights).shards
    assert [len(shard.q_heads) for shard in shards] == heads
    assert [len(shard.kv_heads) for shard in shards] == kv_heads


def test_more_ranks_than_kv_heads_replicates_them() -> None:
    shard_map = ShardMap.build(DEMO, 5)
    assert [len(shard.q_heads) for shard in shard_map.shards] == [2, 2, 1, 2, 2]
    assert [shard.q_per_kv for shard in shard_map.shards] == [(2,), (1, 1), (1,), (1, 1), (2,)]
    assert [shard_map.owners(kv_head) for kv_head in range(3)] == [(0, 1), (1, 2, 3), (3, 4)]
    assert shard_map.replicated_bytes(2) == 4 * 2 * 64 * 576 * 30 * 2


def test_size_one_is_the_whole_model() -> None:
    shard = ShardMap.build(DEMO, 1).shard(0)
    assert shard == Shard(0, range(9), range(3), range(1536), range(49152), 3)


@pytest.mark.parametrize(
    ("world_size", "weights", "message"),
    [
        (12, None, "tensor_parallel_size=12 is more than num_q_heads=9; use 1 to 9"),
        (0, None, "tensor_parallel_size=0 is less than 1; use 1 to 9"),
        (2, [1.0], "shard_weights has 1 entries but tensor_parallel_size=2; give one weight per shard"),
        (2, [1.0, 0.0], r"shard_weights\[1\]=0.0 must be a finite number above 0"),
        (2, [float("nan"), 1.0], r"shard_weights\[0\]=nan must be a finite number above 0"),
    ],
)
def test_impossible_sizes_and_weights_are_refused(
    world_size: int, weights: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ShardMap.build(DEMO, world_size, weights)


def test_query_heads_must_fill_the_groups() -> None:
    with pytest.raises(ValueError, match="num_q_heads=9 is not a multiple of num_kv_heads=2"):
        ModelDims(576, 30, 9, 2, 64, 1536, 49152, True)


@given(weighted_maps())
def test_every_part_is_dealt_exactly_once(case: tuple[ShardMap, list[float]]) -> None:
    shard_map, _ = case
    dims, shards = shard_map.dims, shard_map.shards
    assert covers([shard.q_heads for shard in shards], dims.num_q_heads)
    assert covers([shard.mlp_columns for shard in shards], dims.intermediate_size)
    assert covers([shard.vocab_rows for shard in shards], dims.vocab_size)
    assert all(shard.q_heads and shard.vocab_rows for shard in shards), "no rank is without a head or a row"
    for shard in shards:
        assert {head // dims.group_size for head in shard.q_heads} == set(shard.kv_heads)
        assert sum(shard.q_per_kv) == len(shard.q_heads)
        assert all(shard.q_per_kv)
        assert shard.mlp_columns.start % MLP_UNIT == 0
    if not split(shard_map):
        assert covers([shard.kv_heads for shard in shards], dims.num_kv_heads)
    for kv_head in range(dims.num_kv_heads):
        assert shard_map.owners(kv_head) == tuple(s.rank for s in shards if kv_head in s.kv_heads) != ()


@given(weighted_maps())
def test_head_counts_are_within_one_of_fair(case: tuple[ShardMap, list[float]]) -> None:
    shard_map, weights = case
    counts = [len(shard.q_heads if split(shard_map) else shard.kv_heads) for shard in shard_map.shards]
    weight_sum = sum(Fraction(weight) for weight in weights)
    fair = [Fraction(weight) / weight_sum * sum(counts) for weight in weights]
    # Where some rank's fair share is under one head it still gets one, at the expense of the others.
    bumped = sum(max(Fraction(0), 1 - share) for share in fair)
    for count, share in zip(counts, fair, strict=True):
        assert share - bumped - 1 <= count <= max(Fraction(1), share + 1)


@given(dims_of_any_size(), st.data())
def test_no_rank_has_more_heads_of_a_kind_than_with_whole_groups(
    dims: ModelDims, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, dims.num_kv_heads))
    shards = ShardMap.build(dims, world_size).shards
    groups = -(-dims.num_kv_heads // world_size)
    assert max(len(shard.kv_heads) for shard in shards) <= groups
    assert max(len(shard.q_heads) for shard in shards) <= groups * dims.group_size


@given(weighted_maps())
def test_bytes_add_up_to_the_whole_model_and_the_copies(case: tuple[ShardMap, list[float]]) -> None:
    shard_map, _ = case
    dims = shard_map.dims
    attention = dims.hidden_size * dims.head_dim * (2 * dims.num_q_heads + 2 * dims.num_kv_heads)
    layer = attention + 3 * dims.hidden_size * dims.intermediate_size
    whole = 2 * (dims.num_layers * layer + dims.vocab_size * dims.hidden_size)
    read = sum(shard_map.decode_bytes(rank, 2) for rank in range(shard_map.world_size))
    assert read == whole + shard_map.replicated_bytes(2)
    assert ShardMap.build(dims, 1).replicated_bytes(2) == 0


@given(weighted_maps())
def test_no_rank_reads_over_its_share_by_more_than_dealing_whole_things_explains(
    case: tuple[ShardMap, list[float]],
) -> None:
    """At most 2 % over, or over by no more than one KV group, one run of MLP columns and one vocabulary row."""
    shard_map, weights = case
    dims = shard_map.dims
    read = [shard_map.decode_bytes(rank, 1) for rank in range(shard_map.world_size)]
    weight_sum = sum(Fraction(weight) for weight in weights)
    one_group = dims.num_layers * dims.hidden_size * dims.head_dim * (2 * dims.group_size + 2)
    slack = one_group + dims.num_layers * dims.hidden_size * 3 * MLP_UNIT + dims.hidden_size
    for rank, weight in enumerate(weights):
        share = Fraction(weight) / weight_sum * sum(read)
        assert read[rank] <= max(share * Fraction(102, 100), share + slack)


@pytest.mark.parametrize("world_size", range(1, 10))
def test_demo_model_is_level_within_two_percent_at_every_size(world_size: int) -> None:
    shard_map = ShardMap.build(DEMO, world_size)
    read = [shard_map.decode_bytes(rank, 2) for rank in range(world_size)]
    assert max(read) <= 1.02 * sum(read) / world_size


@pytest.mark.parametrize("weights", [[1.0, 2.0], [3.0, 1.0], [1.0, 1.5, 2.0], [5.0, 5.0, 2.0, 2.0]])
def test_weights_decide_the_bytes(weights: list[float]) -> None:
    dims = ModelDims(4096, 32, 32, 8, 128, 14336, 128256, False)
    shard_map = ShardMap.build(dims, len(weights), weights)
    read = [shard_map.decode_bytes(rank, 2) for rank in range(len(weights))]
    for rank, weight in enumerate(weights):
        assert read[rank] == pytest.approx(sum(read) * weight / sum(weights), rel=0.001)


def held(shard_map: ShardMap, rank: int) -> dict[str, set[int]]:
    return {part: set(getattr(shard_map.shard(rank), part)) for part in PARTS}


@settings(max_examples=60)
@given(st.data())
def test_moves_bring_exactly_what_is_missing(data: st.DataObject) -> None:
    """Applying the moves to what each rank holds gives the other map; nothing held is sent, nothing twice."""
    dims = ModelDims(64, 2, 12, data.draw(st.sampled_from([1, 3, 4, 12])), 16, 300, 211, False)
    old = ShardMap.build(dims, data.draw(st.integers(1, 12)))
    weights = data.draw(st.none() | st.just([1.0, 2.0, 3.0]))
    new = ShardMap.build(dims, len(weights) if weights else data.draw(st.integers(1, 12)), weights)
    lost = data.draw(st.sets(st.integers(0, old.world_size - 1)))
    alive = [rank for rank in range(old.world_size) if rank not in lost]

    after = {
        rank: held(old, rank) if rank in alive else {part: set() for part in PARTS}
        for rank in range(new.world_size)
    }
    for move in old.moves(new, lost=lost):
        indices = set(move.indices)
        assert indices, "an empty move"
        assert not indices & after[move.destination][move.part], "sent what was already there"
        if move.source is None:
            assert not any(indices & held(old, rank)[move.part] for rank in alive), "a rank could give this"
        else:
            assert move.source in alive
            assert indices <= held(old, move.source)[move.part]
        after[move.destination][move.part] |= indices
        assert indices <= held(new, move.destination)[move.part], "sent what is not needed"
    for rank in range(new.world_size):
        for part, needed in held(new, rank).items():
            assert needed <= after[rank][part], f"rank {rank} lacks {part}"


def test_moving_to_the_same_map_moves_nothing() -> None:
    shard_map = ShardMap.build(DEMO, 5)
    assert shard_map.moves(ShardMap.build(DEMO, 5)) == []

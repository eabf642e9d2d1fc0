"""Sums and gathers of real processes: every back end must give the bits of one plain definition."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributed import Store

from kvshard.parallel.all_reduce import SUM_DTYPES
from kvshard.parallel.group import Group, GroupError

from .ranks import connect, run_ranks

# 70001 elements are more than one slot (64 KiB here) of every dtype.
SHAPES = [(1,), (1, 576), (5, 123), (3, 1, 7), (70001,), (0, 7)]
KINDS = ["native", "python", "gloo"]


def connect_kind(store: Store, rank: int, world_size: int, kind: str, epoch: int) -> Group:
    if kind == "python":
        path, os.environ["PATH"] = os.environ["PATH"], ""  # no compiler
        try:
            group = connect(store, rank, world_size, epoch=epoch)
        finally:
            os.environ["PATH"] = path
    else:
        backend = "gloo" if kind == "gloo" else "shared_memory"
        group = connect(store, rank, world_size, backend=backend, epoch=epoch)
    if kind != "gloo":
        assert ring_of(group) == ("PythonRing" if kind == "python" else "NativeRing")
    return group


def ring_of(group: Group) -> str:
    return type(group._transport._ring).__name__  # type: ignore[union-attr]


def values(shape: tuple[int, ...], dtype: torch.dtype, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + rank)
    if dtype is torch.int64:
        return torch.randint(-(2**62), 2**62, shape, generator=generator)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 100).to(dtype)


def sum_by_definition(inputs: list[Tensor]) -> Tensor:
    total = inputs[0].to(SUM_DTYPES[inputs[0].dtype])
    for x in inputs[1:]:
        total = total + x.to(total.dtype)
    return total.to(inputs[0].dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def check_sums(group: Group) -> None:
    for dtype in SUM_DTYPES:
        for shape in SHAPES:
            inputs = [values(shape, dtype, rank) for rank in range(group.world_size)]
            x = inputs[group.rank].clone()
            assert group.all_reduce(x, f"{dtype} {shape}") is x
            assert same_bits(x, sum_by_definition(inputs)), f"{group.backend} {dtype} {shape}"
            if dtype.is_floating_point:
                exact = torch.stack(inputs).double().sum(0)
                size = torch.stack(inputs).double().abs().sum(0)
                bound = torch.finfo(dtype).eps * group.world_size * size
                assert bool(((x.double() - exact).abs() <= bound).all()), f"{group.backend} {dtype} {shape}"


def check_order_and_rounding(group: Group) -> None:
    """Cases in which another order, or another type of the total, gives other bits."""
    n, rank = group.world_size, group.rank
    if n >= 3:
        parts = [1e8, 1.0, -1e8] + [0.0] * (n - 3)
        x = torch.tensor([parts[rank]])
        assert group.all_reduce(x, "order").item() == 0.0  # (1e8 + 1) - 1e8; any other pairing of 1e8 gives 1
        parts = [1.0, 2**-8, 2**-8] + [0.0] * (n - 3)
        x = torch.tensor([parts[rank]], dtype=torch.bfloat16)
        assert group.all_reduce(x, "float32 total").item() == 1 + 2**-7  # in bfloat16: 1
    # To nearest, ties to even; overflow; infinities and NaN.
    rounded = torch.tensor([1.0, 1 + 2**-7, 3.3e38, float("inf"), float("nan"), -float("inf"), -0.0])
    other = torch.tensor([2**-8, 2**-8, 3.3e38, 1.0, 1.0, float("inf"), -0.0])
    inputs = [rounded.bfloat16(), other.bfloat16()] + [torch.full((7,), -0.0).bfloat16()] * (n - 2)
    x = group.all_reduce(inputs[rank].clone(), "bfloat16 rounding")
    assert x[:4].tolist() == [1.0, 1 + 2**-6, float("inf"), float("inf")]
    assert x[4:6].isnan().tolist() == [True, True]
    assert (x[6].item(), torch.signbit(x[6]).item()) == (0.0, True)


def check_gathers(group: Group) -> None:
    for dtype in (torch.uint8, torch.bool, torch.int32, torch.bfloat16, torch.int64, torch.float64):
        for shape in [(1,), (3, 5), (), (200_001,), (2, 0)]:
            inputs = [
                torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(r)).to(dtype)
                for r in range(group.world_size)
            ]
            out = group.all_gather(inputs[group.rank], f"{dtype} {shape}")
            assert out.dtype == dtype
            assert same_bits(out, torch.stack(inputs)), f"{group.backend} {dtype} {shape}"


def check_many(group: Group, count: int) -> None:
    """Collectives of changing size back to back: a slot written too early would be seen."""
    n, rank = group.world_size, group.rank
    for step in range(count):
        x = torch.full((1 + step * 37 % 501,), step + rank, dtype=torch.int64)
        group.all_reduce(x, f"step {step}")
        assert bool((x == n * step + n * (n - 1) // 2).all()), f"{group.backend} step {step}"
        if step % 7 == 0:
            out = group.all_gather(torch.tensor([step * 100 + rank]), f"step {step}")
            assert out.flatten().tolist() == [step * 100 + r for r in range(n)]
        if step % 50 == 0:
            group.barrier(f"step {step}")


def all_kinds(store: Store, rank: int, world_size: int) -> list[str]:
    for epoch, kind in enumerate(KINDS):
        group = connect_kind(store, rank, world_size, kind, epoch)
        check_sums(group)
        check_order_and_rounding(group)
        check_gathers(group)
        check_many(group, 60 if kind == "gloo" else 600)
        group.barrier("end")
        group.close()
    return KINDS


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_every_back_end_sums_in_rank_order(world_size: int) -> None:
    assert run_ranks(all_kinds, world_size) == [KINDS] * world_size


def nine(store: Store, rank: int, world_size: int) -> str:
    group = connect(store, rank, world_size)
    check_sums(group)
    check_gathers(group)
    check_many(group, 100)
    group.barrier("end")
    return group.backend


def test_more_ranks_than_cores() -> None:
    assert run_ranks(nine, 9) == ["shared_memory"] * 9


def test_the_definition_tells_orders_apart() -> None:
    """The inputs above would catch a sum in another order, and one in another type."""
    inputs = [values((70001,), torch.float32, rank) for rank in range(3)]
    assert not same_bits(sum_by_definition(inputs), sum_by_definition(inputs[::-1]))
    halves = [x.bfloat16() for x in inputs]
    assert not same_bits(sum_by_definition(halves), halves[0] + halves[1] + halves[2])


def one_without_compiler(store: Store, rank: int, world_size: int) -> tuple[str, str]:
    if rank == 1:
        os.environ["PATH"] = ""
    group = connect(store, rank, world_size)
    group.barrier("end")
    return group.backend, ring_of(group)


def test_one_rank_without_compiler_makes_all_use_python() -> None:
    assert run_ranks(one_without_compiler, 2) == [("shared_memory", "PythonRing")] * 2


def other_size(store: Store, rank: int, world_size: int, kind: str) -> str:
    group = connect_kind(store, rank, world_size, kind, epoch=0)
    with pytest.raises(GroupError) as caught:
        group.all_reduce(torch.ones(4 if rank else 5), "layer 0 o_proj")
    return str(caught.value)


@pytest.mark.parametrize("kind", ["native", "python"])
def test_ranks_in_different_collectives_are_told(kind: str) -> None:
    errors = run_ranks(other_size, 2, kind)
    assert any("in another collective" in error for error in errors), errors


def test_one_rank_needs_nothing() -> None:
    group = Group.single("cpu")
    x = torch.ones(3)
    assert group.all_reduce(x, "here") is x
    assert group.all_gather(x, "here").shape == (1, 3)
    group.barrier("here")
    assert (group.rank, group.world_size, group.backend) == (0, 1, "single")
    group.abort("enough")
    with pytest.raises(GroupError, match="enough"):
        group.all_reduce(x, "here")


def test_a_tensor_that_is_not_contiguous_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="not contiguous"):
        Group.single("cpu").all_reduce(torch.ones(4, 4).t(), "layer 1 down_proj")


def test_shapes_cover_several_pieces() -> None:
    sizes = sorted(torch.Size(shape).numel() for shape in SHAPES)
    assert any(a * 8 < 64 * 1024 < b * 2 for a, b in pairwise(sizes))

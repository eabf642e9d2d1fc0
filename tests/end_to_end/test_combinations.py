"""A seeded walk over random combinations of features: every row gives what it gives alone on one shard.

A case has its seed in its id, and is drawn from that alone: what fails can be run again by itself, by the same id.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alone import generate, make_word_model, num_parted, open_llm, run_alone
from combinations import BLOCK_SIZES, CACHE_DTYPES, FAMILIES, ROW_SETTINGS, SIZES, Case, draw_case

SEEDS = range(13)
MORE_SEEDS = range(13, 120)


def param(seed: int, *marks: pytest.MarkDecorator) -> Any:
    case = draw_case(seed)
    return pytest.param(case, id=case.id, marks=marks)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.cache(lambda family: make_word_model(tmp_path_factory.mktemp(family), family))


@pytest.mark.parametrize(
    "case",
    [*map(param, SEEDS), *(param(seed, pytest.mark.slow) for seed in MORE_SEEDS)],
)
def test_rows_are_as_alone(case: Case, model_of: Callable[[str], Path]) -> None:
    print(case)  # pytest shows it when the case fails
    model, cache_dtype = model_of(case.family), case.cache_dtype
    alone = run_alone(model, case.rows, cache_dtype)
    with open_llm(model, case.size, cache=case.cache, scheduler=case.scheduler) as llm:
        outputs = generate(llm, case.rows)
        print(llm._engine.coordinator.stats)
    parted = [num_parted(got, truth, cache_dtype) for got, truth in zip(outputs, alone, strict=True)]
    assert sum(parted) <= 1, f"answers that left the truth at a near-tie, by row: {parted}"


def test_a_case_is_its_seed_alone() -> None:
    assert str(draw_case(3)) == str(draw_case(3)) != str(draw_case(4))


def test_the_walk_comes_by_everything() -> None:
    cases = [draw_case(seed) for seed in (*SEEDS, *MORE_SEEDS)]
    assert {case.family for case in cases[: len(SEEDS)]} == set(FAMILIES)
    taken_in_turn = {"family": FAMILIES, "size": SIZES, "cache_dtype": CACHE_DTYPES}
    for first, second in itertools.combinations(taken_in_turn, 2):
        met = {(getattr(case, first), getattr(case, second)) for case in cases}
        assert met == set(itertools.product(taken_in_turn[first], taken_in_turn[second]))
    assert {case.cache["block_size"] for case in cases} == set(BLOCK_SIZES)
    assert {case.scheduler["run_ahead"] for case in cases} == {0, 1, 2}
    drawn = {field for case in cases for row in case.rows for field in row.settings}
    assert drawn >= set(ROW_SETTINGS)
    assert num_pairs(cases) == len(ROW_SETTINGS) * (len(ROW_SETTINGS) - 1) // 2


def num_pairs(cases: list[Case]) -> int:
    """Pairs of settings that some row has both of."""
    rows = [set(row.settings) & set(ROW_SETTINGS) for case in cases for row in case.rows]
    return len({frozenset((a, b)) for row in rows for a in row for b in row if a != b})

"""The decoder over quantised caches: every size gives the logits of one shard, near those of the full cache."""

import functools
from pathlib import Path

import pytest
import torch
from decoder_ranks import reference, trace, trace_model
from family_models import CASES, make_family_model
from models_factory import make_model
from ranks import run_ranks
from tolerances import assert_within

from kvshard.parallel.group import Group

PROMPTS = [[5, 17, 99, 3, 42, 8, 77], [61, 2, 30], [9, 9, 54, 12, 80, 33, 21, 4, 6, 11, 71, 25, 90]]
CUT = 2  # prompts are run in two steps, so that the second reads the cache of the first
# Root mean square error of the logits, of their standard deviation. Measured: 0.019, 0.081 and 0.25.
ERRORS = {"int8": 0.025, "fp8": 0.11, "int4": 0.33}


def logits_of(path: Path, size: int, cache_dtype: str) -> list[torch.Tensor]:
    """[prompts, vocab] of the prompts' last tokens, as every rank has them."""
    return [torch.from_numpy(logits) for _, logits in run_ranks(trace, size, path, PROMPTS, CUT, cache_dtype)]


@pytest.mark.parametrize("cache_dtype", ERRORS)
def test_sizes_agree_and_errors_are_small(cache_dtype: str, tmp_path: Path) -> None:
    """Two KV heads: dealt to 2 shards, and held twice by 3 and 6."""
    make_model(num_key_value_heads=2).save_pretrained(tmp_path)
    (full,) = logits_of(tmp_path, 1, "auto")
    (one,) = logits_of(tmp_path, 1, cache_dtype)
    error = (one - full).square().mean().sqrt() / full.std()
    assert ERRORS[cache_dtype] / 4 < error < ERRORS[cache_dtype], error
    for size in (2, 3, 6):
        for logits in logits_of(tmp_path, size, cache_dtype):
            assert_within(logits, one, "logits of a quantised cache")


@functools.cache
def full_logits(case: str) -> torch.Tensor:
    """[prompts, vocab] by transformers in float64."""
    return reference(make_family_model(case), PROMPTS)[1]


@pytest.mark.parametrize("cache_dtype", ERRORS)
@pytest.mark.parametrize("case", CASES)
def test_errors_are_small_in_every_family(case: str, cache_dtype: str, tmp_path: Path) -> None:
    make_family_model(case).save_pretrained(tmp_path)
    _, logits = trace_model(Group.single(torch.device("cpu")), tmp_path, PROMPTS, CUT, cache_dtype)
    full = full_logits(case)
    error = (torch.from_numpy(logits) - full).square().mean().sqrt() / full.std()
    assert ERRORS[cache_dtype] / 8 < error < ERRORS[cache_dtype], error

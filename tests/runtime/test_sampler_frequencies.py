"""How often tokens are sampled, against exact probabilities.

These are worked out here in float64, setting by setting, as vLLM documents them. FALSE_ALARMS of `frequencies.py` is the
share of seeds for which a correct sampler would fail one of these tests.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from frequencies import follows
from thread_ranks import ThreadGroup, run_on_threads, uneven_shares
from torch import Tensor

from kvshard.runtime.coordinator.logits_rules import LogitsRules
from kvshard.runtime.coordinator.plan import SlotSampling
from kvshard.runtime.shard.sampler import Sampler

VOCAB_SIZE = 30
LOGITS = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(8))
BATCH = 1000
OUTPUT = (3, 3, 7, 11, 3, 29, 0)
PENALTIES = {"presence_penalty": 0.6, "frequency_penalty": 0.3, "repetition_penalty": 1.4}

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 12},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all limits": {"temperature": 1.3, "min_p": 0.05, "top_k": 20, "top_p": 0.9},
    "presence": {"rules": LogitsRules(presence_penalty=0.9, output_ids=OUTPUT)},
    "frequency": {"rules": LogitsRules(frequency_penalty=0.5, output_ids=OUTPUT)},
    "repetition": {"rules": LogitsRules(repetition_penalty=1.8, prompt_ids=(1, 2, 20), output_ids=OUTPUT)},
    "bias": {"rules": LogitsRules(logit_bias=((4, 1.5), (20, -2.0), (29, 0.7)))},
    "masks": {"rules": LogitsRules(allowed_token_ids=tuple(range(5, 27)), bad_words=((6,), (0, 9), (3, 8)))},
    "everything": {
        "temperature": 0.8,
        "min_p": 0.02,
        "top_k": 18,
        "top_p": 0.95,
        "rules": LogitsRules(
            **PENALTIES,  # type: ignore[arg-type]
            logit_bias=((4, 1.5), (20, -2.0), (29, 0.7)),
            allowed_token_ids=tuple(range(28)),
            bad_words=((6,), (0, 9)),
            prompt_ids=(1, 2, 20),
            output_ids=OUTPUT,
        ),
    },
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(**changes: Any) -> SlotSampling:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 99, "logprobs": False}
    return SlotSampling(**{**values, "stop_ids": (), "stop_from": 0, **changes})


def exact_probabilities(logits: Tensor, sampling: SlotSampling) -> Tensor:
    """[V] float64, by vLLM's order: masks, bias, penalties, temperature, min_p, top_k, top_p."""
    rules = sampling.rules or LogitsRules()
    changed = logits.double()
    if rules.allowed_token_ids is not None:
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        allowed[list(rules.allowed_token_ids)] = True
        changed = changed.masked_fill(~allowed, -math.inf)
    for *beginning, last in rules.bad_words:
        if rules.output_ids[len(rules.output_ids) - len(beginning) :] == tuple(beginning):
            changed[last] = -math.inf
    for token_id, bias in rules.logit_bias:
        changed[token_id] += bias
    for token_id in {*rules.prompt_ids, *rules.output_ids}:
        logit = float(changed[token_id])
        logit = logit / rules.repetition_penalty if logit > 0 else logit * rules.repetition_penalty
        count = rules.output_ids.count(token_id)
        changed[token_id] = logit - rules.frequency_penalty * count - rules.presence_penalty * (count > 0)
    probs = (changed / sampling.temperature).softmax(0)
    probs = probs.where(probs >= sampling.min_p * probs.max(), 0.0)
    if sampling.top_k > 0:
        probs = probs.where(probs >= probs.sort(descending=True).values[sampling.top_k - 1], 0.0)
    if sampling.top_p < 1.0:
        descending = (probs / probs.sum()).sort(descending=True).values
        needed = int(
            (descending.cumsum(0) < sampling.top_p).sum()
        )  # tokens before the one that reaches top_p
        probs = probs.where(probs / probs.sum() >= descending[needed], 0.0)
    return probs / probs.sum()


def draw(sampling: SlotSampling, num_draws: int, world_size: int = 1) -> list[npt.NDArray[np.int64]]:
    """Tokens for LOGITS at positions 0 .. num_draws - 1, as each rank has them."""

    def run(group: ThreadGroup) -> npt.NDArray[np.int64]:
        rows = uneven_shares(VOCAB_SIZE, world_size)[group.rank]
        sampler = Sampler(group, rows, VOCAB_SIZE, 1, group.device)  # type: ignore[arg-type]
        logits = LOGITS[rows.start : rows.stop].expand(BATCH, -1).contiguous()
        tokens = []
        for start in range(0, num_draws, BATCH):
            sampler.open(0, sampling)  # what it drew before does not count
            positions = np.arange(start, start + BATCH, dtype=np.int64)
            tokens.append(sampler.sample(logits, np.zeros(BATCH, np.int32), positions)[0].numpy())
        return np.concatenate(tokens)

    return run_on_threads(world_size, run)


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_follow_the_probabilities(name: str) -> None:
    """And a temperature that is a tenth off is noticed."""
    sampling = settings(**SETTINGS[name])
    (tokens,) = draw(sampling, 60_000)
    assert follows(tokens, exact_probabilities(LOGITS, sampling))
    warmer = dataclasses.replace(sampling, temperature=sampling.temperature * 1.1)
    assert not follows(tokens, exact_probabilities(LOGITS, warmer))


def test_so_they_do_when_the_vocabulary_is_sharded() -> None:
    """And a temperature that is a quarter off is noticed: three threads take their time, so these are fewer draws."""
    sampling = settings(**SETTINGS["everything"])
    warmer = dataclasses.replace(sampling, temperature=sampling.temperature * 1.25)
    for tokens in draw(sampling, 10_000, world_size=3):
        assert follows(tokens, exact_probabilities(LOGITS, sampling))
        assert not follows(tokens, exact_probabilities(LOGITS, warmer))


@pytest.mark.parametrize("name", ["presence", "frequency", "repetition", "bias", "masks"])
def test_a_setting_that_is_left_out_is_noticed(name: str) -> None:
    (tokens,) = draw(settings(), 60_000)
    assert not follows(tokens, exact_probabilities(LOGITS, settings(**SETTINGS[name])))


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_next_token_follows_what_its_penalties_make_of_the_last(world_size: int) -> None:
    """Pairs of a token and the next one, whose probability depends on the first: counted on the device only."""
    logits, num_tokens, num_pairs = LOGITS[:6], 6, 12_000
    sampling = settings(temperature=1.5, rules=LogitsRules(**PENALTIES))  # type: ignore[arg-type]
    assert sampling.rules is not None
    pairs = torch.empty(num_tokens, num_tokens, dtype=torch.float64)
    for token_id, probability in enumerate(exact_probabilities(logits, sampling)):
        after = dataclasses.replace(sampling.rules, output_ids=(token_id,))
        pairs[token_id] = probability * exact_probabilities(
            logits, dataclasses.replace(sampling, rules=after)
        )

    def run(group: ThreadGroup) -> npt.NDArray[np.int64]:
        rows = uneven_shares(num_tokens, world_size)[group.rank]
        sampler = Sampler(group, rows, num_tokens, BATCH, group.device)  # type: ignore[arg-type]
        part = logits[rows.start : rows.stop].expand(BATCH, -1).contiguous()
        slots, drawn = np.arange(BATCH, dtype=np.int32), []
        for first in range(0, num_pairs, BATCH):
            for slot in slots:
                sampler.open(int(slot), dataclasses.replace(sampling, seed=first + int(slot)))
            tokens = [sampler.sample(part, slots, np.full(BATCH, place))[0].numpy() for place in (5, 6)]
            drawn.append(tokens[0] * num_tokens + tokens[1])
        return np.concatenate(drawn)

    for drawn in run_on_threads(world_size, run):
        assert follows(drawn, pairs.flatten())
        alike = exact_probabilities(logits, sampling)
        assert not follows(drawn, torch.outer(alike, alike).flatten())

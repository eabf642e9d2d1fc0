"""Tiny models in this process or in forked shards, and the truth for any batch of rows: each row alone on one shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from family_models import make_family_model
from forked_shards import ForkedLauncher
from models_factory import save_word_tokenizer
from tolerances import NEAR_TIES
from torch import Tensor

from kvshard import LLM, SamplingParams
from kvshard.launch.outputs import CompletionOutput, Logprob, RequestOutput
from kvshard.parallel.group import Group
from kvshard.runtime.coordinator.plan import SlotSampling
from kvshard.runtime.shard.sampler import Sampler

CPU = torch.device("cpu")
AMPLE_BLOCKS = 200
TOKENIZER = "tokenizer"  # folder
_TRIES = 64

Place = dict[int, Logprob]


@dataclass(frozen=True)
class Row:
    """One prompt and what is asked for, as fields of SamplingParams."""

    prompt: list[int]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """What one token was chosen from: logits [V] with all but temperature and limits applied, which are in `sampling`."""

    logits: Tensor
    sampling: SlotSampling
    position: int

    def hangs_on(self, difference: float) -> bool:
        """True when logits that are up to `difference` apart from these give another token in one try of many."""
        generator = torch.Generator().manual_seed(0)
        moves = torch.rand(_TRIES, len(self.logits), generator=generator) * 2 - 1
        sampler = Sampler(Group.single(CPU), range(len(self.logits)), len(self.logits), 1, CPU)
        sampler.open(0, dataclasses.replace(self.sampling, rules=None, stop_ids=()))
        places = np.zeros(_TRIES, np.int32), np.full(_TRIES, self.position, np.int64)
        token_ids = sampler.sample(self.logits + difference * moves, *places)[0]
        return len(set(token_ids.tolist())) > 1


@dataclass
class Recorder:
    """Stands in for a sampler of one row at a time, and keeps every choice."""

    sampler: Sampler
    choices: list[Choice] = field(default_factory=list)
    opened: dict[int, SlotSampling] = field(default_factory=dict)

    def open(self, slot: int, sampling: SlotSampling) -> None:
        self.opened[slot] = sampling
        self.sampler.open(slot, sampling)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def sample(self, logits: Tensor, slots: Any, positions: Any) -> Any:
        assert len(slots) == 1, "one row at a time"
        changed = self.sampler._processors.apply(logits, slots, positions)[0].clone()
        self.choices.append(Choice(changed, self.opened[int(slots[0])], int(positions[0])))
        return self.sampler.sample(logits, slots, positions)


@dataclass(frozen=True)
class Alone:
    """One answer of a row that ran alone, and what each of its tokens was chosen from."""

    answer: CompletionOutput
    choices: list[Choice]
    prompt_logprobs: list[Place | None] | None


def make_word_model(path: Path, case: str, **overrides: Any) -> Path:
    """A tiny checkpoint of one of the cases of `family_models`, with a tokenizer of words.

    That is in a folder of its own: beside a config of Qwen2, transformers makes any tokenizer one of Qwen2's.
    """
    make_family_model(case, **overrides).save_pretrained(path)
    save_word_tokenizer(path / TOKENIZER)
    return path


@contextmanager
def open_llm(model: Path, size: int, **settings: Any) -> Iterator[LLM]:
    """A float32 LLM on forked shards, or in this process for one; after each step its blocks and slots must agree."""
    launcher = ForkedLauncher(size) if size > 1 else None
    with (
        mock.patch("kvshard.launch.engine._launcher", return_value=launcher),
        LLM(
            str(model),
            tokenizer=str(model / TOKENIZER),
            tensor_parallel_size=size,
            device="cpu",
            dtype="float32",
            threads_per_shard=1,
            **settings,
        ) as llm,
    ):
        coordinator = llm._engine.coordinator
        step = coordinator.step

        def checked_step() -> Any:
            ended = step()
            coordinator.check_integrity()
            return ended

        coordinator.step = checked_step  # type: ignore[method-assign]
        yield llm


def generate(llm: LLM, rows: Sequence[Row]) -> list[RequestOutput]:
    prompts = [{"prompt_token_ids": row.prompt} for row in rows]
    return llm.generate(prompts, [SamplingParams(**row.settings) for row in rows])


def run_alone(model: Path, rows: Sequence[Row], cache_dtype: str) -> list[list[Alone]]:
    """Every row's answers, one row after the other on one shard, whole prompts, nothing in flight, nothing shared."""
    with open_llm(
        model,
        1,
        cache={"dtype": cache_dtype, "num_blocks": AMPLE_BLOCKS, "prefix_caching": False},
        scheduler={"max_num_seqs": 1, "run_ahead": 0},
    ) as llm:
        worker = llm._engine.executor.worker  # type: ignore[attr-defined]
        worker._sampler = recorder = Recorder(worker._sampler)
        outputs = generate(llm, rows)
    choices = iter(recorder.choices)
    alone = [
        [
            Alone(answer, [next(choices) for _ in answer.token_ids], output.prompt_logprobs)
            for answer in output.outputs
        ]
        for output in outputs
    ]
    assert next(choices, None) is None, "a token was chosen and is in no answer"
    return alone


def num_parted(got: RequestOutput, alone: list[Alone], cache_dtype: str) -> int:
    """How many of a row's answers leave the truth; see `parts`."""
    assert got.error is None
    compare_logprobs(got.prompt_logprobs, alone[0].prompt_logprobs, cache_dtype)
    num_parted = 0
    for answer, expected in zip(got.outputs, alone, strict=True):
        if parts(answer, expected, cache_dtype):
            num_parted += 1
        else:
            compare_logprobs(answer.logprobs, expected.answer.logprobs, cache_dtype)
    return num_parted


def parts(got: CompletionOutput, alone: Alone, cache_dtype: str) -> bool:
    """Whether an answer leaves the truth at a near-tie; fails for any other difference."""
    expected, near = alone.answer, NEAR_TIES[cache_dtype]
    pairs = enumerate(zip(got.token_ids, expected.token_ids, strict=False))
    place = next((place for place, (ours, theirs) in pairs if ours != theirs), None)
    if place is not None:
        assert alone.choices[place].hangs_on(near), (
            f"{got.token_ids} parts from {expected.token_ids} at {place}, where logits {near} apart choose no other token"
        )
        return True
    assert got.token_ids == expected.token_ids, "one is a prefix of the other"
    assert (got.text, got.finish_reason, got.stop_reason) == (
        expected.text,
        expected.finish_reason,
        expected.stop_reason,
    )
    return False


def compare_logprobs(
    got: Sequence[Place | None] | None, expected: Sequence[Place | None] | None, cache_dtype: str
) -> None:
    """Equal but for rounding: a logarithm of a sum differs by no more than the logits do."""
    assert (got is None) == (expected is None)
    for ours, theirs in zip(got or (), expected or (), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert len(ours) == len(theirs)
            common = ours.keys() & theirs.keys()  # the last of several may be another one at a near-tie
            assert len(common) >= len(ours) - 1
            for token_id in common:
                apart = abs(ours[token_id].logprob - theirs[token_id].logprob)
                assert apart <= 2 * NEAR_TIES[cache_dtype]

"""A coordinator on the shards of fake_shards.py, and requests for it."""

import zlib

import numpy as np
from fake_answers import VOCAB, assert_prompt_as_expected, expected

# Some are for tests only.
from fake_answers import expected_prompt as expected_prompt
from fake_answers import next_token as next_token
from fake_answers import noise_key as noise_key
from fake_shards import FakeShards
from fake_shards import make_table as make_table

from kvshard.runtime.config import Task
from kvshard.runtime.coordinator.limits import Limits
from kvshard.runtime.coordinator.loop import Coordinator
from kvshard.runtime.coordinator.request import Request
from kvshard.runtime.models.spec import LayerGroup
from kvshard.runtime.sampling_params import SamplingParams


class LetterTokenizer:
    """One letter a token; those below `num_special` are special."""

    def __init__(self, num_special: int = 0) -> None:
        self.num_special = num_special

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        num_left_out = self.num_special if skip_special_tokens else 0
        return "".join(chr(0x4E00 + token) for token in token_ids if token >= num_left_out)


def make_limits(**changes: object) -> Limits:
    """Room for everything, unless changed. windows: of layer groups with one layer each."""
    windows = changes.pop("windows", (None,))
    values: dict[str, object] = {
        "num_blocks": 400,
        "block_size": 4,
        "max_model_len": 200,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "run_ahead": 1,
        "layer_groups": tuple(LayerGroup(window, 1) for window in windows),  # type: ignore[attr-defined]
    }
    return Limits(**{**values, **changes})  # type: ignore[arg-type]


def make_tokens(name: str, count: int) -> list[int]:
    """Tokens that depend on the name."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    tokens: list[int] = random.integers(0, VOCAB, count).tolist()
    return tokens


def make_request(
    name: str, num_prompt: int, prefix: list[int] | None = None, task: Task = "generate", **sampling: object
) -> Request:
    """A request whose prompt depends on its name behind `prefix`, as does its seed."""
    prompt = (prefix or []) + make_tokens(name, num_prompt - len(prefix or []))
    return Request.new(name, prompt, SamplingParams.model_validate(sampling), task=task)


class Run:
    """A coordinator on fake shards; its clock counts the readings taken."""

    def __init__(
        self, limits: Limits, eos: tuple[int, ...] = (), tokenizer: LetterTokenizer | None = None
    ) -> None:
        self.limits = limits
        self.eos = eos
        self.shards = FakeShards(limits)
        self.now_s = 0.0
        self.coordinator = Coordinator(
            self.shards,  # type: ignore[arg-type]
            limits,
            eos_token_ids=eos,
            tokenizer=tokenizer,
            clock=self._clock,
        )
        self.blocks = self.coordinator._scheduler.blocks.managers
        self.shards.is_kept = lambda group, block: self.blocks[group].is_published(block)
        self.finished: list[Request] = []

    def _clock(self) -> float:
        self.now_s += 1.0
        return self.now_s

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.coordinator.add(request)

    def step(self) -> list[Request]:
        finished = self.coordinator.step()
        self.coordinator.check_integrity()
        self.finished += finished
        return finished

    def to_the_end(self, most_steps: int = 5000) -> "Run":
        for _ in range(most_steps):
            if not self.coordinator.has_work:
                assert not any(blocks.num_used for blocks in self.blocks), "blocks are left at the end"
                return self
            self.step()
        raise AssertionError(f"not done after {most_steps} steps")

    def assert_as_expected(self, *requests: Request) -> None:
        for request in requests:
            output, reason = expected(request, self.eos, self.limits.max_model_len, self.shards.windows)
            assert request.status == "finished"
            assert (request.output_token_ids, request.finish_reason) == (output, reason), request.request_id
            assert_prompt_as_expected(request, self.shards.windows)

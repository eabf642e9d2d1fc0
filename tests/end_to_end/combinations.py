"""Random combinations of features, each drawn from a seed: a model, a way to run it, and rows with settings of their own.

To walk over a new sampling setting, add it to ROW_SETTINGS; over another setting of the run, add it to `draw_case`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from alone import AMPLE_BLOCKS, Row
from family_models import CASES

# A seed takes these in turn, and an ample cache every third time; the numbers have no common factor, so that every pair is
# met within their product.
FAMILIES = tuple(
    CASES
)  # 6 query heads, 1 or 2 KV heads: uneven over 4 and 5, more shards than KV heads from 2 or 3
SIZES = (1, 2, 3, 4, 5)
CACHE_DTYPES = ("auto", "int8", "fp8", "int4")

BLOCK_SIZES = (2, 4, 8, 16)
MAX_LEN = 60  # tokens of a row; the models have 64 positions
VOCABULARY = range(3, 101)

Draw = Callable[[Random], Any]


def _tokens(rng: Random, most: int) -> list[int]:
    return rng.sample(VOCABULARY, rng.randint(1, most))


def _bad_words(rng: Random) -> list[str]:
    return [" ".join(f"w{token_id}" for token_id in _tokens(rng, 2)) for _ in range(rng.randint(1, 30))]


def _stop_strings(rng: Random) -> list[str]:
    """Words, and ends of one with the beginning of the next."""
    return [
        rng.choice(("{0} w{1}", "w{0}{1}")).format(*rng.choices(range(10), k=2))
        for _ in range(rng.randint(1, 3))
    ]


# Fields of SamplingParams; each row has a random share of these.
ROW_SETTINGS: dict[str, Draw] = {
    "temperature": lambda rng: {"temperature": rng.choice((0.0, 0.4, 1.0, 1.8))},
    "n": lambda rng: {"n": rng.choice((2, 3))},
    "top_k": lambda rng: {"top_k": rng.choice((1, 4, 40, 1000))},
    "top_p": lambda rng: {"top_p": rng.choice((0.2, 0.8, 0.99))},
    "min_p": lambda rng: {"min_p": rng.choice((0.01, 0.3))},
    "seed": lambda rng: {"seed": rng.getrandbits(63)},
    "presence_penalty": lambda rng: {"presence_penalty": rng.uniform(-2, 2)},
    "frequency_penalty": lambda rng: {"frequency_penalty": rng.uniform(-2, 2)},
    "repetition_penalty": lambda rng: {"repetition_penalty": rng.uniform(0.6, 2)},
    "logit_bias": lambda rng: {"logit_bias": {token_id: rng.uniform(-5, 5) for token_id in _tokens(rng, 9)}},
    "allowed_token_ids": lambda rng: {"allowed_token_ids": sorted(rng.sample(range(101), 60))},
    "bad_words": lambda rng: {"bad_words": _bad_words(rng)},
    "stop": lambda rng: {"stop": _stop_strings(rng)},
    "include_stop_str_in_output": lambda rng: {"include_stop_str_in_output": True},
    "stop_token_ids": lambda rng: {"stop_token_ids": _tokens(rng, 9)},
    "min_tokens": lambda rng: {"min_tokens": rng.randint(1, 8)},
    "ignore_eos": lambda rng: {"ignore_eos": True},
    "logprobs": lambda rng: {"logprobs": rng.choice((0, 1, 5))},
    "prompt_logprobs": lambda rng: {"prompt_logprobs": rng.choice((0, 3))},
}


@dataclass(frozen=True)
class Case:
    """What one seed draws."""

    seed: int
    family: str
    size: int
    cache: dict[str, Any]  # settings of the job file's group of that name, as scheduler
    scheduler: dict[str, Any]
    rows: list[Row]

    @property
    def cache_dtype(self) -> str:
        dtype: str = self.cache["dtype"]
        return dtype

    @property
    def id(self) -> str:
        return f"{self.seed}-{self.family}-{self.size}-{self.cache_dtype}"

    def __str__(self) -> str:
        head = f"seed {self.seed}: {self.family} on {self.size} shards, cache={self.cache} scheduler={self.scheduler}"
        return "\n  ".join([head, *(f"{index}: {row}" for index, row in enumerate(self.rows))])


def draw_case(seed: int) -> Case:
    rng = Random(seed)
    shared = rng.choices(VOCABULARY, k=rng.randint(0, 24))  # what some of the prompts begin with
    rows = [_draw_row(rng, shared) for _ in range(rng.randint(4, 8))]
    max_num_seqs = rng.randint(2, 6)
    block_size = rng.choice(BLOCK_SIZES)
    longest = max(len(row.prompt) + row.settings["max_tokens"] for row in rows)
    fewest_blocks = -(-longest // block_size) + 1  # so many as the longest row needs alone, and block 0
    return Case(
        seed,
        family=FAMILIES[seed % len(FAMILIES)],
        size=SIZES[seed % len(SIZES)],
        cache={
            "dtype": CACHE_DTYPES[seed % len(CACHE_DTYPES)],
            "block_size": block_size,
            "num_blocks": fewest_blocks + rng.randint(0, 3) if seed % 3 else AMPLE_BLOCKS,
            "prefix_caching": rng.random() < 0.7,
        },
        scheduler={
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": rng.choice((max_num_seqs, 8, 16, 256)),
            "max_model_len": longest,
            "run_ahead": rng.randint(0, 2),
        },
        rows=rows,
    )


def _draw_row(rng: Random, shared: list[int]) -> Row:
    begun = shared if rng.random() < 0.7 else []
    prompt = begun + rng.choices(VOCABULARY, k=rng.randint(1, 20))
    share = rng.choice((0.1, 0.3, 0.6))
    settings: dict[str, Any] = {"max_tokens": rng.randint(8, min(24, MAX_LEN - len(prompt)))}
    for draw in ROW_SETTINGS.values():
        if rng.random() < share:
            settings |= draw(rng)
    if settings.get("n", 1) > 1 and settings.get("temperature") == 0:
        settings["temperature"] = 0.7  # greedy answers would all be the same, and are refused
    return Row(prompt, settings)

"""Jobs with `cache.dtype`: the same answers whole on one shard, and on two in chunks with preempted rows.

A product of another shape may round a key at a tie to the code beside it, and each such step of the format moves all
that follows: greedy tokens part where the logits are close. So one run's answers are scored by the other, and the two
must agree better than either agrees with a cache that is not quantised. Were their codes rounded independently, they
would not.
"""

from pathlib import Path
from typing import Any

import pytest
from jobs import JobRun, run_job, write_job
from reference import quickstart_prompts, tokenize

MAX_TOKENS = 24


def run(folder: Path, rows: list[dict[str, Any]], size: int, cache: dict[str, Any], budget: int) -> JobRun:
    config = {
        "model": "demo",
        "dtype": "float32",
        "device": "cpu",
        "tensor_parallel_size": size,
        "launcher": "local",
        "sampling": {"temperature": 0.0},
        "cache": cache,
        "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": budget, "max_model_len": 256},
    }
    done = run_job(write_job(folder, config, rows))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def score(folder: Path, prompts: list[list[int]], answers: list[list[int]], dtype: str) -> list[float]:
    """Log-probabilities of all tokens of `answers`, from one shard that takes each prompt and answer in one step."""
    rows = [
        {"id": str(i), "prompt_token_ids": prompt + answer, "max_tokens": 1, "prompt_logprobs": 1}
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    scored = run(folder, rows, 1, {"dtype": dtype, "num_blocks": 400}, 1024)
    logprobs = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        places = scored.body(str(i))["prompt_logprobs"][len(prompt) :]
        logprobs += [place[str(token)]["logprob"] for place, token in zip(places, answer, strict=True)]
    return logprobs


def distance(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_answers(dtype: str, tmp_path: Path) -> None:
    prompts = sorted(tokenize(quickstart_prompts()), key=len)[:8]
    rows = [
        {"id": str(i), "prompt_token_ids": prompt, "max_tokens": MAX_TOKENS, "logprobs": 1}
        for i, prompt in enumerate(prompts)
    ]
    parts = run(tmp_path / "parts", rows, 2, {"dtype": dtype, "num_blocks": 17}, 16)
    assert parts.counter("chunked prompts") > 0
    assert parts.counter("preemptions") > 0
    choices = [parts.body(row["id"])["choices"][0] for row in rows]
    answers = [choice["token_ids"] for choice in choices]
    got = [logprob for choice in choices for logprob in choice["logprobs"]["token_logprobs"]]
    whole = score(tmp_path / "whole", prompts, answers, dtype)
    unquantised = score(tmp_path / "unquantised", prompts, answers, "auto")
    assert distance(got, whole) < distance(whole, unquantised)

"""Job files of tiny models with a tokenizer of words, and their lines as the Python API's outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alone import TOKENIZER, Place, Row
from jobs import JobRun, run_job, write_job

from kvshard.launch.outputs import CompletionOutput, Logprob


def run_rows(
    folder: Path, model: Path, launcher: str, size: int, rows: dict[str, dict[str, Any]], **config: Any
) -> JobRun:
    """Lines by id, in little room: chunks of 8 tokens, at most 4 rows at once, plans ahead."""
    values = {
        "model": str(model),
        "tokenizer": str(model / TOKENIZER),
        "launcher": launcher,
        "tensor_parallel_size": size,
        "device": "cpu",
        "threads_per_shard": 1,
        "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 64, "run_ahead": 2},
    }
    done = run_job(write_job(folder, values | config, [{"id": name, **row} for name, row in rows.items()]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.rows.keys() == rows.keys()
    return done


def line_of(row: Row) -> dict[str, Any]:
    """What a job's input has for a row."""
    return {"prompt_token_ids": row.prompt, **row.settings}


def answer_of(choice: dict[str, Any]) -> CompletionOutput:
    return CompletionOutput(
        index=choice["index"],
        text=choice["message"]["content"] if "message" in choice else choice["text"],
        token_ids=choice["token_ids"],
        cumulative_logprob=None,
        logprobs=None,
        finish_reason=choice["finish_reason"],
        stop_reason=choice["stop_reason"],
    )


def chosen_of(choice: dict[str, Any]) -> list[Place]:
    """The log probabilities of a completion's tokens."""
    chosen = zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
    return [{token_id: Logprob(logprob, 0, "")} for token_id, logprob in chosen]


def places_of(body: dict[str, Any]) -> list[Place | None]:
    """The log probabilities of a prompt."""
    return [
        None if place is None else {int(token_id): Logprob(**values) for token_id, values in place.items()}
        for place in body["prompt_logprobs"]
    ]

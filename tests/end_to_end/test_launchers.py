"""One job file with many features at once, by every launcher: each row is answered as it is alone on one shard."""

import re
from pathlib import Path
from typing import Any

import pytest
from alone import TOKENIZER, Place, Row, compare_logprobs, make_word_model, parts, run_alone
from feature_rows import PLAIN, PROMPT, feature_rows
from jobs import run_job, write_job

from kvshard.launch.outputs import CompletionOutput, Logprob

TEMPLATE = "{% for message in messages %}w9 {{ message['content'] }} {% endfor %}w10"
CHAT = [{"role": "user", "content": "w5 w6 w7"}, {"role": "user", "content": "w8"}]
CHAT_IDS = [9, 5, 6, 7, 9, 8, 10]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 2, every second layer with a window of 4 tokens; two shards have 2 and 1 of the heads, and the same KV head."""
    return make_word_model(
        tmp_path_factory.mktemp("model"), "gemma2", num_attention_heads=3, num_key_value_heads=1
    )


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


@pytest.mark.parametrize(
    ("launcher", "size", "cache_dtype"),
    [("local", 1, "fp8"), ("local", 2, "int4"), ("ray", 2, "auto"), ("torchrun", 2, "auto")],
)
def test_a_job_of_many_features(
    launcher: str, size: int, cache_dtype: str, model: Path, tmp_path: Path
) -> None:
    [[plain]] = run_alone(model, [PLAIN], cache_dtype)
    rows = {"plain": PLAIN, **feature_rows(plain.answer.token_ids), "chat": Row(CHAT_IDS, PLAIN.settings)}
    alone = dict(zip(rows, run_alone(model, list(rows.values()), cache_dtype), strict=True))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    config = {
        "model": str(model),
        "tokenizer": str(model / TOKENIZER),
        "chat_template": "chat.jinja",
        "launcher": launcher,
        "tensor_parallel_size": size,
        "device": "cpu",
        "threads_per_shard": 1,
        "cache": {"dtype": cache_dtype, "block_size": 4, "num_blocks": 19},
        "scheduler": {
            "max_num_seqs": 4,
            "max_num_batched_tokens": 8,
            "max_model_len": 64,
            "run_ahead": 2,
        },
        "sampling": PLAIN.settings,
    }
    lines = [
        {
            "id": name,
            **({"messages": CHAT} if name == "chat" else {"prompt_token_ids": PROMPT}),
            **row.settings,
        }
        for name, row in rows.items()
    ]
    done = run_job(write_job(tmp_path, config, lines))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.rows.keys() == rows.keys()
    choices = {name: line["response"]["body"]["choices"] for name, line in done.rows.items()}
    parted = [
        name
        for name in rows
        for choice, truth in zip(choices[name], alone[name], strict=True)
        if parts(answer_of(choice), truth, cache_dtype)
    ]
    assert len(parted) <= 1, f"answers that left the truth at a near-tie: {parted}"
    assert "message" in choices["chat"][0]
    if "logprobs" not in parted:
        [choice], [truth] = choices["logprobs"], alone["logprobs"]
        places = zip(choice["token_ids"], truth.answer.logprobs or (), strict=True)
        chosen = [{token_id: place[token_id]} for token_id, place in places]
        compare_logprobs(chosen_of(choice), chosen, cache_dtype)
        assert {len(place) for place in choice["logprobs"]["top_logprobs"]} == {3}
    of_prompt = places_of(done.rows["prompt_logprobs"]["response"]["body"])
    compare_logprobs(of_prompt, alone["prompt_logprobs"][0].prompt_logprobs, cache_dtype)

    assert done.counter("chunked prompts") > 0
    assert done.counter("preemptions") > 0
    assert done.counter("plans ahead") == 2
    found = re.search(r"Prefix cache +([\d,]+) of", done.stdout)
    assert found is not None
    assert int(found[1].replace(",", "")) > 0

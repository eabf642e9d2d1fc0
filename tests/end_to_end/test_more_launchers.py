"""Every family, every cache, scores, streams and aborts by every launcher: what test_launchers.py has no room for."""

from pathlib import Path
from typing import Any

import pytest
from alone import TOKENIZER, Row, make_word_model, open_llm, parts, run_alone
from feature_rows import PLAIN, PROMPT
from launched import answer_of, line_of, run_rows
from tolerances import NEAR_TIES

from kvshard import LLM, SamplingParams

ROWS = {
    "greedy": Row(PROMPT, PLAIN.settings | {"temperature": 0.0}),
    "sampled": PLAIN,
    "short": Row(PROMPT[:3], PLAIN.settings | {"top_p": 0.9, "repetition_penalty": 1.3}),
}
TEXTS = {"whole": PROMPT, "half": PROMPT[:11], "two": PROMPT[:2]}

# Each family by both, each cache by both.
FAMILIES = [
    ("llama_linear", "ray", "int8"),
    ("llama_yarn", "ray", "fp8"),
    ("mistral", "ray", "int4"),
    ("qwen2", "ray", "auto"),
    ("qwen3", "ray", "int8"),
    ("gemma3", "ray", "auto"),
    ("phi3", "ray", "fp8"),
    ("olmo2", "ray", "auto"),
    ("llama_linear", "torchrun", "fp8"),
    ("llama_yarn", "torchrun", "int4"),
    ("mistral", "torchrun", "auto"),
    ("qwen2", "torchrun", "int8"),
    ("qwen3", "torchrun", "auto"),
    ("gemma3", "torchrun", "int4"),
    ("phi3", "torchrun", "auto"),
    ("olmo2", "torchrun", "int8"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "launcher", "cache_dtype"), FAMILIES)
def test_a_family_by_a_launcher(family: str, launcher: str, cache_dtype: str, tmp_path: Path) -> None:
    model = make_word_model(tmp_path / "model", family)
    alone = dict(zip(ROWS, run_alone(model, list(ROWS.values()), cache_dtype), strict=True))
    lines = {name: line_of(row) for name, row in ROWS.items()}
    done = run_rows(tmp_path, model, launcher, 2, lines, cache={"dtype": cache_dtype, "block_size": 4})
    bodies = {name: line["response"]["body"] for name, line in done.rows.items()}
    parted = [
        name
        for name, [truth] in alone.items()
        if parts(answer_of(bodies[name]["choices"][0]), truth, cache_dtype)
    ]
    assert len(parted) <= 1, f"answers that left the truth at a near-tie: {parted}"
    assert done.counter("chunked prompts") > 0


@pytest.mark.parametrize(
    ("launcher", "size", "cache_dtype"),
    [
        ("local", 5, "int8"),
        pytest.param("ray", 2, "auto", marks=pytest.mark.slow),
        pytest.param("torchrun", 2, "auto", marks=pytest.mark.slow),
    ],
)
def test_scores(launcher: str, size: int, cache_dtype: str, tmp_path: Path) -> None:
    """Six heads in two groups; five shards have 1, 1, 2, 1 and 1 of them."""
    model = make_word_model(tmp_path / "model", "qwen2")
    with open_llm(model, 1, cache={"dtype": cache_dtype}) as llm:
        alone = llm.score([{"prompt_token_ids": ids} for ids in TEXTS.values()])
    lines: dict[str, dict[str, Any]] = {name: {"prompt_token_ids": ids} for name, ids in TEXTS.items()}
    done = run_rows(
        tmp_path,
        model,
        launcher,
        size,
        lines,
        task="score",
        cache={"dtype": cache_dtype, "block_size": 4, "num_blocks": 17},
    )
    for name, expected in zip(TEXTS, alone, strict=True):
        body = done.rows[name]["response"]["body"]
        num_scored = len(TEXTS[name]) - 1
        assert expected.logprob_sum is not None
        apart = abs(body["logprob_sum"] - expected.logprob_sum) / num_scored
        assert apart <= 2 * NEAR_TIES[cache_dtype]
    assert done.rows["whole"]["response"]["body"]["logprob_sum"] < alone[1].logprob_sum


@pytest.mark.slow
def test_streams_and_aborts_by_ray(tmp_path: Path) -> None:
    model = make_word_model(tmp_path / "model", "qwen2")
    rows = [Row(PROMPT[::-1], PLAIN.settings | {"max_tokens": 40}), *ROWS.values()]
    alone = run_alone(model, rows, "auto")
    prompts = [{"prompt_token_ids": row.prompt} for row in rows]
    with LLM(
        str(model),
        tokenizer=str(model / TOKENIZER),
        tensor_parallel_size=2,
        launcher="ray",
        device="cpu",
        dtype="float32",
        threads_per_shard=1,
    ) as llm:
        outputs = []
        for output in llm.generate(prompts, [SamplingParams(**row.settings) for row in rows], stream=True):
            outputs.append(output)
            llm.abort("0")
    aborted, *others = sorted(outputs, key=lambda output: output.prompt_index)
    assert outputs[0] is not aborted
    num_tokens = len(aborted.outputs[0].token_ids)
    assert aborted.outputs[0].finish_reason == "abort"
    assert 0 < num_tokens < 40
    assert aborted.outputs[0].token_ids == alone[0][0].answer.token_ids[:num_tokens]
    parted = [
        parts(output.outputs[0], truth, "auto") for output, [truth] in zip(others, alone[1:], strict=True)
    ]
    assert sum(parted) <= 1

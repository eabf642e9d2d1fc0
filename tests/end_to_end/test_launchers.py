"""One job file with many features at once, by every launcher: each row is answered as it is alone on one shard."""

import re
from pathlib import Path

import pytest
from alone import Row, compare_logprobs, make_word_model, parts, run_alone
from feature_rows import PLAIN, feature_rows
from launched import answer_of, chosen_of, line_of, places_of, run_rows

TEMPLATE = (
    "{% for message in messages %}w9 {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w10{% endif %}"
)
CHAT = [{"role": "user", "content": "w5 w6 w7"}, {"role": "user", "content": "w8"}]
CHAT_IDS = [9, 5, 6, 7, 9, 8, 10]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 2, every second layer with a window of 4 tokens; two shards have 2 and 1 of the heads, and the same KV head."""
    return make_word_model(
        tmp_path_factory.mktemp("model"), "gemma2", num_attention_heads=3, num_key_value_heads=1
    )


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
    lines = {name: line_of(row) for name, row in rows.items()}
    lines["chat"] = {"messages": CHAT, **PLAIN.settings}
    done = run_rows(
        tmp_path,
        model,
        launcher,
        size,
        lines,
        chat_template="chat.jinja",
        cache={"dtype": cache_dtype, "block_size": 4, "num_blocks": 19},
        sampling=PLAIN.settings,
    )
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
        # The chosen one too, where it is not among them.
        assert {len(place) for place in choice["logprobs"]["top_logprobs"]} <= {3, 4}
    of_prompt = places_of(done.rows["prompt_logprobs"]["response"]["body"])
    compare_logprobs(of_prompt, alone["prompt_logprobs"][0].prompt_logprobs, cache_dtype)

    assert done.counter("chunked prompts") > 0
    assert done.counter("preemptions") > 0
    assert done.counter("plans ahead") == 2
    found = re.search(r"Prefix cache +([\d,]+) of", done.stdout)
    assert found is not None
    assert int(found[1].replace(",", "")) > 0

"""Input rows: both formats, and every way in which one line can be wrong."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvshard.runtime.batch.inputs import find_inputs, read_lines
from kvshard.runtime.batch.records import BadRow, Row, read_rows
from kvshard.runtime.batch.response import error_line
from kvshard.runtime.errors import ConfigError
from kvshard.runtime.sampling_params import SamplingParams

DEFAULTS = SamplingParams(temperature=0.5, max_tokens=7, stop="x")
USER = {"role": "user", "content": "hi"}
CHAT = {"messages": [USER]}


def read(tmp_path: Path, *lines: Any, line_format: Any = "auto") -> list[Row | BadRow]:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return list(read_rows([file], DEFAULTS, line_format))


def openai(body: dict[str, Any], url: str = "/v1/chat/completions", custom_id: str = "a") -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def test_plain_rows_take_what_they_lack_from_the_job(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        {"id": "a", "prompt": "hello"},
        {"id": 7, "prompt_token_ids": [1, 2], "temperature": 0, "stop": None, "max_tokens": 3},
        {"id": "c", **CHAT, "top_k": 5, "stop": ["p", "q"], "stop_token_ids": [4], "logprobs": True},
    )
    assert rows == [
        Row("a", "hello", False, DEFAULTS),
        Row("7", [1, 2], False, SamplingParams(temperature=0, max_tokens=3, stop="x")),
        Row(
            "c",
            CHAT["messages"],
            True,
            SamplingParams(
                temperature=0.5, max_tokens=7, top_k=5, stop=("p", "q"), stop_token_ids=(4,), logprobs=0
            ),
        ),
    ]
    assert isinstance(rows[0], Row)
    assert rows[0].sampling is DEFAULTS  # a million rows share it


def test_openai_lines(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rows = read(
        tmp_path,
        openai(
            {"model": "m", "user": "u", "metadata": {"k": 1}, **CHAT, "max_completion_tokens": 9, "seed": 3}
        ),
        openai({"prompt": "p", "n": 1, "stream": False, "tools": None}, "/v1/completions", "b"),
        openai({"messages": [{"role": "user", "content": parts, "name": "me"}]}, custom_id="c"),
    )
    assert rows == [
        Row("a", CHAT["messages"], True, SamplingParams(temperature=0.5, max_tokens=9, seed=3, stop="x")),
        Row("b", "p", False, DEFAULTS),
        Row("c", [{"role": "user", "content": "a\nb", "name": "me"}], True, DEFAULTS),
    ]


@pytest.mark.parametrize("form", ["plain", "openai"])
def test_everything_that_sampling_may_say(tmp_path: Path, form: str) -> None:
    fields = {
        "presence_penalty": 1,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": -300, "7": 1},
        "allowed_token_ids": [5, 6, 7],
        "bad_words": ["bad", "worse"],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
    line = {"id": "a", **CHAT, **fields} if form == "plain" else openai(CHAT | fields)
    [row] = read(tmp_path, line)
    assert isinstance(row, Row)
    assert row.sampling == DEFAULTS.model_copy(
        update=fields
        | {
            "logit_bias": {5: -100.0, 7: 1.0},
            "allowed_token_ids": (5, 6, 7),
            "bad_words": ("bad", "worse"),
        }
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "a", ', "not valid JSON"),
        (b'{"id": "a", "prompt": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "JSON"),
        (b'{"id": "a", "prompt": "x", "seed": ' + b"1" * 5000 + b"}", "JSON"),
        ([1], "must be a JSON object, not a list"),
        ({"prompt": "x"}, "id is missing"),
        ({"id": "", "prompt": "x"}, "id must be a string"),
        ({"id": True, "prompt": "x"}, "id must be a string that is not empty, not true or false"),
        (b'{"id": "\\ud800", "prompt": "x"}', "id holds half of a surrogate pair"),
        ({"custom_id": 5, "body": CHAT}, "custom_id must be a string"),
    ],
)
def test_a_line_without_a_usable_id_is_named_after_its_line(tmp_path: Path, line: Any, message: str) -> None:
    good = [{"id": "first", "prompt": "x"}, {"id": "last", "prompt": "x"}]
    rows = read(tmp_path, good[0], b"", line, good[1])
    assert [row.row_id for row in rows] == ["first", "line-3", "last"]
    bad = rows[1]
    assert isinstance(bad, BadRow)
    assert bad.message.startswith("rows.jsonl line 3: ")
    assert message in bad.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no prompt: give messages, prompt or prompt_token_ids"),
        ({"prompt": None}, "no prompt"),
        ({"prompt": 5}, "prompt must be a string or a list of token ids, not 5"),
        ({"prompt": ["a", "b"]}, "prompt is a list of 2 strings; give each a line of its own"),
        ({"prompt": [True]}, "prompt must be"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt_token_ids": "x"}, "prompt_token_ids must be a list of token ids"),
        ({"prompt": "x", **CHAT}, "messages and prompt are both given"),
        ({"messages": []}, "messages must be a list that is not empty"),
        ({"messages": ["hi"]}, "messages[0] must be an object"),
        ({"messages": [{"role": "user"}]}, "messages[0].content must be a string, not null"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part that is not text"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ({**CHAT, "tools": [{"type": "function"}]}, "tools="),
        ({**CHAT, "n": 0}, "n=0"),
        ({**CHAT, "n": 2, "temperature": 0}, "n=2 with temperature=0"),
        ({**CHAT, "stream": True}, "stream=true is not supported"),
        ({**CHAT, "response_format": {"type": "json_object"}}, "response_format="),
        ({**CHAT, "max_token": 2}, "field max_token is not supported; did you mean max_tokens?"),
        (
            {**CHAT, "max_tokens": 3, "max_completion_tokens": 4},
            "max_tokens and max_completion_tokens differ",
        ),
        ({**CHAT, "max_tokens": "5"}, 'max_tokens="5": Input should be a valid integer'),
        ({**CHAT, "max_tokens": True}, "max_tokens=true"),
        ({**CHAT, "temperature": -1}, "temperature=-1"),
        ({**CHAT, "temperature": float("nan")}, "temperature=NaN"),
        ({**CHAT, "min_tokens": 8}, "min_tokens=8 is more than max_tokens=7"),
        ({**CHAT, "logprobs": 21}, "logprobs=21: Input should be less than or equal to 20"),
        ({**CHAT, "logprobs": -1}, "logprobs=-1"),
        ({**CHAT, "logprobs": False, "top_logprobs": 5}, "top_logprobs=5 needs logprobs=true"),
        ({**CHAT, "top_logprobs": 5}, "top_logprobs=5 needs logprobs=true"),
        (
            {**CHAT, "logprobs": True, "top_logprobs": 21},
            "top_logprobs=21: expected a whole number from 0 to 20",
        ),
        ({**CHAT, "logprobs": True, "top_logprobs": "3"}, 'top_logprobs="3": expected'),
        ({**CHAT, "n": True}, "expected a whole number, not true"),
        ({**CHAT, "stop_token_ids": ["x"]}, 'stop_token_ids.0="x"'),
        ({**CHAT, "temperature": float("inf")}, "temperature=Infinity"),
        # No plan could hold these.
        ({**CHAT, "top_k": 2**64}, "top_k=18446744073709551616: Input should be less than"),
        ({**CHAT, "min_tokens": 2**64}, "min_tokens=18446744073709551616"),
        ({**CHAT, "stop_token_ids": [2**64]}, "stop_token_ids.0=18446744073709551616"),
        ({**CHAT, "presence_penalty": 3}, "presence_penalty=3: Input should be less than or equal to 2"),
        ({**CHAT, "repetition_penalty": "1"}, 'repetition_penalty="1"'),
        ({**CHAT, "logit_bias": {"x": 1}}, "logit_bias.x"),
        ({**CHAT, "logit_bias": {"1": True}}, "logit_bias.1=true"),
        ({**CHAT, "allowed_token_ids": []}, "allowed_token_ids=[]"),
        ({**CHAT, "bad_words": "word"}, 'bad_words="word"'),
        ({**CHAT, "detokenize": False}, "stop strings are looked for in the text"),
        # No tokenizer takes these, and a template may print them.
        ({"messages": [{"role": "\ud83d", "content": "x"}]}, "messages[0].role holds half of a surrogate"),
        ({"messages": [{**USER, "name": "\ud83d"}]}, "messages[0].name holds half of a surrogate"),
        ({"messages": [{**USER, "name": 5}]}, "messages[0].name must be a string, not a number"),
    ],
)
@pytest.mark.parametrize("form", ["plain", "openai"])
def test_a_bad_field_is_an_error_row_that_names_it(
    tmp_path: Path, form: str, fields: dict[str, Any], message: str
) -> None:
    line = {"id": "a", **fields} if form == "plain" else {"custom_id": "a", "body": fields}
    [row] = read(tmp_path, line)
    assert isinstance(row, BadRow)
    assert (row.row_id, row.code) == ("a", "invalid_line")
    assert message in row.message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**openai(CHAT), "method": "GET"}, "method must be POST"),
        (openai(CHAT, "/v1/embeddings"), "url must be one of /v1/chat/completions, /v1/completions"),
        (openai(CHAT, "/v1/completions"), "body.prompt is missing, and url is /v1/completions"),
        ({"custom_id": "a"}, "body must be a JSON object, not null"),
        ({**openai(CHAT), "temperature": 0}, "key temperature is not supported"),
    ],
)
def test_a_bad_batch_line(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    [row] = read(tmp_path, line)
    assert isinstance(row, BadRow)
    assert message in row.message


def test_duplicate_ids_keep_the_first(tmp_path: Path) -> None:
    rows = read(
        tmp_path, {"id": "a", "prompt": "1"}, {"id": "line-3", "prompt": "2"}, {"id": "a", "prompt": "3"}
    )
    assert [row.row_id for row in rows] == ["a", "line-3", "line-3-"]
    assert rows[2] == BadRow("line-3-", "duplicate_id", 'rows.jsonl line 3: an earlier row has the id "a"')


def test_the_format_can_be_forced(tmp_path: Path) -> None:
    [row] = read(tmp_path, {"id": "a", "prompt": "x"}, line_format="openai")
    assert isinstance(row, BadRow)
    assert "custom_id is missing" in row.message


def test_globs_and_gz(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('\ufeff{"id": "b", "prompt": "x"}', encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.write('{"id": "a", "prompt": "x"}\n\n{bad\n')
    (tmp_path / "empty.jsonl").touch()
    files = find_inputs(str(tmp_path / "*.jsonl*"))
    rows = list(read_rows(files, DEFAULTS))
    assert [row.row_id for row in rows] == ["a", "a.jsonl.gz:line-3", "b"]


def test_a_file_name_that_is_not_utf_8_can_be_written(tmp_path: Path) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / os.fsdecode(b"caf\xe9.jsonl")]
    for file in files:
        file.write_text("{broken")
    [first, second] = read_rows(files, DEFAULTS)
    assert (first.row_id, second.row_id) == ("a.jsonl:line-1", "caf\\xe9.jsonl:line-1")
    assert isinstance(second, BadRow)
    assert second.message.startswith("caf\\xe9.jsonl line 1: ")
    assert (
        json.loads(error_line(second.row_id, "input_error", second.code, second.message))["custom_id"]
        == second.row_id
    )


def test_lines_are_read_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def endless(files: list[Path]) -> Iterator[Any]:
        nonlocal taken
        for line in read_lines(files):
            while True:
                taken += 1
                yield type(line)(line.file, taken, line.data.replace(b"ID", str(taken).encode()))

    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": "ID", "prompt": "x"}\n')
    monkeypatch.setattr("kvshard.runtime.batch.records.read_lines", endless)
    rows = read_rows([file], DEFAULTS)
    assert [next(rows).row_id for _ in range(3)] == ["1", "2", "3"]
    assert taken == 3


def test_missing_and_empty_inputs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.jsonl does not exist"):
        find_inputs(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ConfigError, match="matches no file"):
        find_inputs(str(tmp_path / "*.jsonl"))
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(ConfigError, match="is empty"):
        find_inputs(str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match=r"cannot read the input file .*rows\.jsonl\.gz"):
        find_inputs(str(tmp_path / "rows.jsonl.gz"))


def test_a_file_cut_short_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    lines = "".join(f'{{"id": "{number * 7919}", "prompt": "x"}}\n' for number in range(20_000))
    file.write_bytes(gzip.compress(lines.encode())[:-2000])
    with pytest.raises(ConfigError, match=r"rows\.jsonl\.gz after line \d+: "):
        list(read_rows([file], DEFAULTS))

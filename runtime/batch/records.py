"""Input rows: OpenAI batch lines or plain ones, read one at a time.

A row that cannot be understood becomes a `BadRow`; the others go on.
"""

import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ..errors import RequestError
from ..models.prompt import Prompt
from ..sampling_params import MAX_LOGPROBS, SamplingParams
from .inputs import InputLine, read_lines


@dataclass(frozen=True)
class Row:
    """One request as its input line states it."""

    row_id: str
    prompt: Prompt
    is_chat: bool  # the answer is a chat.completion, else a text_completion
    sampling: SamplingParams


@dataclass(frozen=True)
class BadRow:
    """An input line that is no request; the message names its file and line."""

    row_id: str
    code: Literal["invalid_line", "duplicate_id"]
    message: str


_SAMPLING = frozenset(SamplingParams.model_fields)
_ALIASES = {"max_completion_tokens": "max_tokens"}
_NO_EFFECT = frozenset({"model", "user", "metadata"})
_PROMPTS = ("messages", "prompt", "prompt_token_ids")
_LINE_KEYS = frozenset({"custom_id", "method", "url", "body"})
_URLS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
_MESSAGE_KEYS = frozenset({"role", "content", "name"})
# Fields that are not supported, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "tools": ([],),
    "response_format": ({"type": "text"},),
}


def read_rows(
    files: list[Path],
    defaults: SamplingParams,
    line_format: Literal["auto", "openai", "plain"] = "auto",
) -> Iterator[Row | BadRow]:
    """Every row of `files`; only the ids are kept in memory.

    Fields that a row does not give (or gives as null) come from `defaults`. A row without a usable id is
    named after its line. Raises ConfigError when a file cannot be read.
    """
    seen: set[str] = set()
    same_names = len({file.name for file in files}) < len(files)
    for line in read_lines(files):
        name = str(line.file) if same_names else line.file.name
        file_name = os.fsencode(name).decode("utf-8", "backslashreplace")  # a name may be any bytes
        place = f"{file_name} line {line.number}"
        row_id = f"line-{line.number}" if len(files) == 1 else f"{file_name}:line-{line.number}"
        while row_id in seen:  # somebody's own id looks like this
            row_id += "-"
        row: Row | BadRow
        try:
            values = _load(line)
            openai = line_format == "openai" or (
                line_format == "auto" and ("custom_id" in values or "body" in values)
            )
            given_id = _read_id(values, "custom_id" if openai else "id")
            if given_id in seen:
                row = BadRow(row_id, "duplicate_id", f'{place}: an earlier row has the id "{given_id}"')
            else:
                row_id = given_id
                row = (
                    _read_openai(row_id, values, defaults)
                    if openai
                    else _read_plain(row_id, values, defaults)
                )
        except RequestError as error:
            row = BadRow(row_id, "invalid_line", f"{place}: {error}")
        seen.add(row.row_id)
        yield row


def _load(line: InputLine) -> dict[str, Any]:
    try:
        values = json.loads(line.data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of over 4300 digits; thousands of brackets
        raise RequestError(f"not usable JSON: {error}") from None
    if not isinstance(values, dict):
        raise RequestError(f"must be a JSON object, not {_kind(values)}")
    return values


def _read_id(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if value is None:
        raise RequestError(f"{key} is missing")
    if isinstance(value, int) and not isinstance(value, bool) and key == "id":
        return str(value)
    if not isinstance(value, str) or not value:
        raise RequestError(f"{key} must be a string that is not empty, not {_kind(value)}")
    return _text(value, key)


def _read_openai(row_id: str, values: dict[str, Any], defaults: SamplingParams) -> Row:
    _refuse_unknown(values, _LINE_KEYS, "key")
    if values.get("method", "POST") != "POST":
        raise RequestError(f"method must be POST, not {values['method']!r}")
    body = values.get("body")
    if not isinstance(body, dict):
        raise RequestError(f"body must be a JSON object, not {_kind(body)}")
    url = values.get("url")
    if url is not None:
        wanted = _URLS.get(url) if isinstance(url, str) else None
        if wanted is None:
            raise RequestError(f"url must be one of {', '.join(_URLS)}, not {url!r}")
        if body.get(wanted) is None:
            raise RequestError(f"body.{wanted} is missing, and url is {url}")
    return _read_request(row_id, body, defaults)


def _read_plain(row_id: str, values: dict[str, Any], defaults: SamplingParams) -> Row:
    return _read_request(row_id, {key: value for key, value in values.items() if key != "id"}, defaults)


def _read_request(row_id: str, body: dict[str, Any], defaults: SamplingParams) -> Row:
    given = {key: value for key, value in body.items() if value is not None}
    fields: dict[str, Any] = {}
    for key, value in given.items():
        name = _ALIASES.get(key, key)
        if name in _SAMPLING:
            value = tuple(value) if isinstance(value, list) else value
            if name in fields and fields[name] != value:
                raise RequestError("max_tokens and max_completion_tokens differ; give one")
            fields[name] = value
        elif key in _NEUTRAL and value not in _NEUTRAL[key]:
            raise RequestError(f"{key}={_short(value)} is not supported; leave {key} out")
    _refuse_unknown(
        given,
        _SAMPLING | _ALIASES.keys() | _NEUTRAL.keys() | _NO_EFFECT | {"top_logprobs", *_PROMPTS},
        "field",
    )
    num_top = given.get("top_logprobs", 0)
    if isinstance(num_top, bool) or num_top not in range(MAX_LOGPROBS + 1):
        raise RequestError(
            f"top_logprobs={_short(num_top)}: expected a whole number from 0 to {MAX_LOGPROBS}"
        )
    if isinstance(fields.get("logprobs"), bool):  # as chat requests say it
        fields["logprobs"] = num_top if fields["logprobs"] else None
    if num_top and fields.get("logprobs") != num_top:
        raise RequestError(f"top_logprobs={_short(num_top)} needs logprobs=true")

    prompts = [key for key in _PROMPTS if key in given]
    if not prompts:
        raise RequestError("no prompt: give messages, prompt or prompt_token_ids")
    if len(prompts) > 1:
        raise RequestError(f"{' and '.join(prompts)} are both given; give one")
    kind = prompts[0]
    prompt = _read_messages(given[kind]) if kind == "messages" else _read_prompt(given[kind], kind)
    return Row(row_id, prompt, kind == "messages", _read_sampling(fields, defaults))


def _read_sampling(fields: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    if not fields:
        return defaults
    try:
        # Strict, so that "max_tokens": "5" or true is an error.
        return SamplingParams.model_validate(defaults.model_dump() | fields, strict=True)
    except ValidationError as error:
        raise RequestError("; ".join(_explain(problem) for problem in error.errors())) from None


def _explain(problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return str(message)
    return f"{'.'.join(map(str, problem['loc']))}={_short(problem['input'])}: {message}"


def _read_prompt(value: Any, key: str) -> Prompt:
    if isinstance(value, str) and key == "prompt":
        return _text(value, key)
    if isinstance(value, list):
        if value and all(isinstance(token, int) and not isinstance(token, bool) for token in value):
            return value
        if key == "prompt" and value and all(isinstance(text, str) for text in value):
            raise RequestError(f"prompt is a list of {len(value)} strings; give each a line of its own")
    wanted = "a string or a list of token ids" if key == "prompt" else "a list of token ids"
    raise RequestError(f"{key} must be {wanted}, not {_short(value)}")


def _read_messages(value: Any) -> Prompt:
    if not isinstance(value, list) or not value:
        raise RequestError(f"messages must be a list that is not empty, not {_short(value)}")
    messages = []
    for index, message in enumerate(value):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f'{where} must be an object like {{"role": "user", "content": "..."}}')
        for key, inner in message.items():
            if key not in _MESSAGE_KEYS and inner is not None:
                raise RequestError(f"{where}.{key} is not supported")
        content = _read_content(message.get("content"), f"{where}.content")
        texts = {"role": _text(message["role"], f"{where}.role"), "content": content}
        if (name := message.get("name")) is not None:
            if not isinstance(name, str):
                raise RequestError(f"{where}.name must be a string, not {_kind(name)}")
            texts["name"] = _text(name, f"{where}.name")
        messages.append(texts)
    return messages


def _read_content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return _text(content, where)
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string, not {_kind(content)}")
    parts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"{where} has a part that is not text: {_short(part)}")
        parts.append(_text(part["text"], where))
    return "\n".join(parts)


def _refuse_unknown(values: dict[str, Any], known: frozenset[str] | set[str], what: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"leave {key} out"
            raise RequestError(f"{what} {key} is not supported; {hint}")


def _text(value: str, where: str) -> str:
    """`value`, if it can be written as UTF-8; JSON can spell half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{where} holds half of a surrogate pair, which is no character") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

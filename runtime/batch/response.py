"""Output lines in the form of OpenAI's batch results, one a row."""

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from ..coordinator.request import Request
from .records import Row

LINE_START = b'{"id":"batch_req_'
"""Every output line begins so; what does not was written by something else."""


class TokenDecoder(Protocol):
    """The part of a tokenizer that log probabilities need."""

    def decode(self, token_ids: list[int]) -> str: ...


def answer_line(row: Row, requests: Sequence[Request], model: str, tokenizer: TokenDecoder) -> bytes:
    """The line of a row whose samples have finished: a choice for each."""
    body = _body(row, requests, model, tokenizer)
    return _line(row.row_id, {"status_code": 200, "request_id": row.row_id, "body": body}, None)


def error_line(row_id: str, kind: Literal["input_error", "system_error"], code: str, message: str) -> bytes:
    """The line of a row that has no answer: an input error is final, a system error runs again."""
    return _line(row_id, None, {"code": code, "message": message, "type": kind})


def _choice(row: Row, request: Request, tokenizer: TokenDecoder) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": request.sample_index}
    if row.is_chat:
        choice["message"] = {"role": "assistant", "content": request.text}
    else:
        choice["text"] = request.text
    choice["finish_reason"] = request.finish_reason
    choice["stop_reason"] = request.stop_reason
    choice["token_ids"] = list(request.output_token_ids)
    choice["logprobs"] = None
    if request.output_logprobs is not None:
        choice["logprobs"] = _logprobs(row, request.output_token_ids, request.output_logprobs, tokenizer)
    return choice


def _body(row: Row, requests: Sequence[Request], model: str, tokenizer: TokenDecoder) -> dict[str, Any]:
    num_prompt = len(requests[0].prompt_token_ids)  # once: they share it
    num_output = sum(len(request.output_token_ids) for request in requests)
    return {
        "id": ("chatcmpl-" if row.is_chat else "cmpl-") + _digest(row.row_id),
        "object": "chat.completion" if row.is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(row, request, tokenizer) for request in requests],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
        },
    }


def _logprobs(
    row: Row, token_ids: list[int], logprobs: list[float], tokenizer: TokenDecoder
) -> dict[str, Any]:
    """The chosen tokens' log probabilities, as chat answers and as completions spell them."""
    tokens = [tokenizer.decode([token_id]) for token_id in token_ids]
    if not row.is_chat:
        return {"tokens": tokens, "token_logprobs": logprobs}
    return {
        "content": [
            {"token": token, "logprob": logprob, "top_logprobs": []}
            for token, logprob in zip(tokens, logprobs, strict=True)
        ]
    }


def _line(row_id: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    line = {"id": f"batch_req_{_digest(row_id)}", "custom_id": row_id, "response": response, "error": error}
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
    # Half a surrogate pair cannot be written as UTF-8; it becomes a question mark.
    return text.encode("utf-8", errors="replace") + b"\n"


def _digest(row_id: str) -> str:
    return hashlib.sha256(row_id.encode()).hexdigest()[:24]

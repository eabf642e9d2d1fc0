"""Output lines in the form of OpenAI's batch results, one a row."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..coordinator.logprobs import Place
from ..coordinator.request import Request
from ..coordinator.scoring import prompt_places, score_of
from .records import Row

LINE_START = b'{"id":"batch_req_'
"""Every output line begins so; what does not was written by something else."""


TokenText = Callable[[int], str]
"""The text of one token."""


def answer_line(row: Row, requests: Sequence[Request], model: str, text_of: TokenText) -> bytes:
    """The line of a row whose samples have finished: a choice for each."""
    body = _body(row, requests, model, text_of)
    return _line(row.row_id, {"status_code": 200, "request_id": row.row_id, "body": body}, None)


def error_line(row_id: str, kind: Literal["input_error", "system_error"], code: str, message: str) -> bytes:
    """The line of a row that has no answer: an input error is final, a system error runs again."""
    return _line(row_id, None, {"code": code, "message": message, "type": kind})


def _choice(row: Row, request: Request, text_of: TokenText) -> dict[str, Any]:
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
        choice["logprobs"] = _logprobs(row, list(request.output_logprobs.places()), text_of)
    return choice


def _body(row: Row, requests: Sequence[Request], model: str, text_of: TokenText) -> dict[str, Any]:
    if requests[0].task == "score":
        return _score(row, requests[0], model, text_of)
    num_prompt = len(requests[0].prompt_token_ids)  # once: they share it
    num_output = sum(len(request.output_token_ids) for request in requests)
    return {
        "id": ("chatcmpl-" if row.is_chat else "cmpl-") + _digest(row.row_id),
        "object": "chat.completion" if row.is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(row, request, text_of) for request in requests],
        "prompt_logprobs": _prompt_logprobs(requests[0], text_of),
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
        },
    }


def _logprobs(row: Row, places: list[Place], text_of: TokenText) -> dict[str, Any]:
    """Log probabilities of the chosen tokens and the most likely ones, as chat answers and as completions spell them."""
    if row.is_chat:
        return {
            "content": [
                {
                    "token": text_of(chosen.token_id),
                    "logprob": chosen.logprob,
                    "top_logprobs": [
                        {"token": text_of(token.token_id), "logprob": token.logprob} for token in top
                    ],
                }
                for chosen, *top in places
            ]
        }
    return {
        "tokens": [text_of(chosen.token_id) for chosen, *_ in places],
        "token_logprobs": [chosen.logprob for chosen, *_ in places],
        "top_logprobs": [_by_text(place, text_of) for place in places],
    }


def _by_text(place: Place, text_of: TokenText) -> dict[str, float]:
    """The most likely tokens, then the chosen one; of two with the same text the likelier stays."""
    chosen, *top = place
    logprobs: dict[str, float] = {}
    for token in (*top, chosen):
        logprobs.setdefault(text_of(token.token_id), token.logprob)
    return logprobs


def _score(row: Row, request: Request, model: str, text_of: TokenText) -> dict[str, Any]:
    score, num_prompt = score_of(request), len(request.prompt_token_ids)
    assert score is not None, "a text that is scored has ended, and well"
    return {
        "id": f"score-{_digest(row.row_id)}",
        "object": "text_score",
        "created": int(time.time()),
        "model": model,
        "logprob_sum": score.logprob_sum,
        "perplexity": score.perplexity,
        "prompt_token_ids": list(request.prompt_token_ids),
        "prompt_logprobs": _prompt_logprobs(request, text_of),
        "usage": {"prompt_tokens": num_prompt, "completion_tokens": 0, "total_tokens": num_prompt},
    }


def _prompt_logprobs(request: Request, text_of: TokenText) -> list[dict[str, Any] | None] | None:
    """As vLLM's server writes them: by token id, and null for the first token."""
    places = prompt_places(request)
    if places is None:
        return None
    return [
        None
        if place is None
        else {
            str(token.token_id): {
                "logprob": token.logprob,
                "rank": token.rank,
                "decoded_token": text_of(token.token_id),
            }
            for token in place
        }
        for place in places
    ]


def _line(row_id: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    line = {"id": f"batch_req_{_digest(row_id)}", "custom_id": row_id, "response": response, "error": error}
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
    # Half a surrogate pair cannot be written as UTF-8; it becomes a question mark.
    return text.encode("utf-8", errors="replace") + b"\n"


def _digest(row_id: str) -> str:
    return hashlib.sha256(row_id.encode()).hexdigest()[:24]

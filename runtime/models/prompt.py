"""From what a row asks to token ids."""

from collections.abc import Sequence
from typing import Any

from ..errors import RequestError

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""A text, token ids, or chat messages with role and content."""


def tokenize_prompt(tokenizer: Any, vocab_size: int, request_id: str, prompt: Prompt) -> list[int]:
    """The token ids of a prompt. `tokenizer` is a fast tokenizer of transformers.

    A text gets the special tokens that the tokenizer adds, such as BOS; messages get those of the chat
    template and no others. Raises RequestError when the prompt cannot be tokenised.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if all(isinstance(item, int) for item in prompt):
        return _checked(prompt, vocab_size, request_id)
    if tokenizer.chat_template is None:
        raise RequestError(
            f'request "{request_id}": it has messages and the tokenizer has no chat template; '
            "set chat_template or send a prompt"
        )
    try:
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # noqa: BLE001 - a template is a program of the model's author: it may raise anything
        raise RequestError(f'request "{request_id}": the chat template refused it: {error}') from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _checked(prompt: Sequence[Any], vocab_size: int, request_id: str) -> list[int]:
    for token_id in prompt:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f'request "{request_id}": token id {token_id} is not in the vocabulary of {vocab_size}'
            )
    return list(prompt)

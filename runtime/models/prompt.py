"""From what a row asks to token ids: its prompt and its bad words."""

from collections.abc import Sequence
from typing import Any

from ..errors import RequestError
from ..sampling_params import SamplingParams

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""A text, token ids, or chat messages with role and content."""


def tokenize_prompt(
    tokenizer: Any, vocab_size: int, request_id: str, prompt: Prompt, *, for_answer: bool = True
) -> list[int]:
    """The token ids of a prompt. `tokenizer` is a fast tokenizer of transformers.

    A text gets the special tokens that the tokenizer adds, such as BOS; messages get those of the chat
    template and no others, and end with the beginning of an answer when it is `for_answer`. Raises RequestError when
    the prompt cannot be tokenised.
    """
    if isinstance(prompt, str):
        return _checked(tokenizer(prompt)["input_ids"], vocab_size, request_id)
    if all(isinstance(item, int) for item in prompt):
        return _checked(prompt, vocab_size, request_id)
    if tokenizer.chat_template is None:
        raise RequestError(
            f'request "{request_id}": it has messages and the tokenizer has no chat template; '
            "set chat_template or send a prompt"
        )
    try:
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=for_answer)
    except Exception as error:  # noqa: BLE001 - a template is a program of the model's author: it may raise anything
        raise RequestError(f'request "{request_id}": the chat template refused it: {error}') from None
    return _checked(tokenizer(text, add_special_tokens=False)["input_ids"], vocab_size, request_id)


def tokenize_bad_words(
    tokenizer: Any, vocab_size: int, request_id: str, words: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """The token sequences that `bad_words` mean: each word as it begins a text, and as it follows a space.

    As in vLLM (`vllm/sampling_params.py`, `update_from_tokenizer`), the second counts when it has as many tokens and
    begins with another one. Raises RequestError for a word without tokens, or beyond the model's vocabulary.
    """
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        plain, spaced = (
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (word.lstrip(), " " + word.lstrip())
        )
        if not plain:
            raise RequestError(f'request "{request_id}": bad_words: {word!r} has no tokens; leave it out')
        sequences[plain] = None
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            sequences[spaced] = None
    for sequence in sequences:
        _checked(sequence, vocab_size, request_id)
    return tuple(sequences)


def check_token_ids(sampling: SamplingParams, vocab_size: int, request_id: str) -> None:
    """Raises RequestError when the settings name a token that the model does not have."""
    for name in ("logit_bias", "allowed_token_ids"):
        for token_id in getattr(sampling, name) or ():
            if token_id >= vocab_size:
                raise RequestError(
                    f'request "{request_id}": {name}: token id {token_id} is not in the vocabulary of {vocab_size}'
                )


def _checked(prompt: Sequence[Any], vocab_size: int, request_id: str) -> list[int]:
    """A tokenizer may know more tokens than its model."""
    for token_id in (min(prompt, default=0), max(prompt, default=0)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f'request "{request_id}": token id {token_id} is not in the vocabulary of {vocab_size}'
            )
    return list(prompt)

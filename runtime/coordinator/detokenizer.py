"""Tokens to text piece by piece, at a total cost linear in the tokens.

A piece of text is final once later tokens cannot change it. Decoding token by token loses what
sits across a border (half characters, the space that sentencepiece puts between words), so a short
window of earlier tokens is decoded along, as in Hugging Face's text-generation-inference.
"""

from collections.abc import Callable
from typing import Protocol

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # how decoders show the first bytes of a character
CONTEXT = 6  # prompt tokens in the first window, and tokens kept when bytes stay undecodable
WINDOW = 16  # tokens decoded along before the window is moved up
LONGEST_WAIT = 32  # tokens after which undecodable bytes are taken for what they are


class TokenDecoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class TokenTexts:
    """The text of single tokens, each decoded once: log probabilities name the same tokens over and over."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._texts: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._decode([token_id])
        return text


class Detokenizer:
    """The text of one request's output tokens."""

    def __init__(
        self, decoder: TokenDecoder, prompt_token_ids: list[int], *, skip_special_tokens: bool = True
    ) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._window = prompt_token_ids[-CONTEXT:]
        self._num_given = len(self._decode())  # characters of the window's text that are given out
        self._border = 0  # tokens of the window up to a border between characters, in its second half

    def feed(self, token_ids: list[int]) -> str:
        """Take new tokens; the text that is final now, without half characters."""
        self._window += token_ids
        text = self._decode()
        end = len(text.rstrip(INCOMPLETE))
        piece = text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        if end < len(text):
            if len(self._window) > LONGEST_WAIT:
                piece += self._give_up_on_old_bytes(text)
        elif self._border and len(self._window) > WINDOW:
            self._start_at(self._border)
            self._num_given = len(self._decode())
        elif not self._border and len(self._window) >= WINDOW // 2:
            self._border = len(self._window)
        return piece

    def finish(self, token_ids: list[int]) -> str:
        """Take the last tokens, none or many; all text not yet given, incomplete characters included."""
        self._window += token_ids
        text = self._decode()
        piece = text[self._num_given :]
        self._num_given = len(text)
        return piece

    def _decode(self) -> str:
        return self._decoder.decode(self._window, skip_special_tokens=self._skip_special_tokens)

    def _start_at(self, border: int) -> None:
        del self._window[:border]
        self._border = 0

    def _give_up_on_old_bytes(self, text: str) -> str:
        """Shorten a window without a border between characters; the text that falls out of it.

        Both windows end alike, so what is still to come is found by its distance from the end.
        """
        num_held = len(text) - self._num_given
        self._start_at(len(self._window) - CONTEXT)
        num_kept = len(self._decode())
        piece = text[self._num_given : len(text) - num_kept] if num_held > num_kept else ""
        self._num_given = max(num_kept - num_held, 0)
        return piece

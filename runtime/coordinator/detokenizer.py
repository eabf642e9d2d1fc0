"""Tokens to text piece by piece, at a total cost linear in the tokens.

A piece of text is final once later tokens cannot change it. Decoding token by token loses what
sits across a border (half characters, the space that sentencepiece puts between words), so a short
window of earlier tokens is decoded along, as in Hugging Face's text-generation-inference.

Two things make text wait. Byte-level tokenizers show the first bytes of a character as U+FFFD. Sentencepiece
tokenizers have tokens for single bytes, and what such tokens stand for, side by side, is decided by all of them: the
ByteFallback decoder of the tokenizers library shows every byte of a run that is not UTF-8 as a whole as U+FFFD. So a
run is final when it has ended, and until then its characters are `pending`.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # how decoders show the first bytes of a character
CONTEXT = 6  # prompt tokens in the first window
WINDOW = 16  # tokens decoded along before the window is moved up, by half
LONGEST_WAIT = 32  # tokens after which undecodable bytes are taken for what they are
LONGEST_CHARACTER = 4  # bytes in UTF-8


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
    """The text of one request's output tokens: what they add to the decoded end of the prompt.

    byte_tokens: token id -> byte, for the tokens that stand for single bytes.
    """

    def __init__(
        self,
        decoder: TokenDecoder,
        prompt_token_ids: list[int],
        byte_tokens: Mapping[int, int],
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._decoder = decoder
        self._byte_tokens = byte_tokens
        self._skip_special_tokens = skip_special_tokens
        self._window = prompt_token_ids[-CONTEXT:]
        self._text = self._decode(self._window)  # the window's, when last decoded
        self._num_given = len(self._text)  # characters of it that are given out
        self._run = bytearray()  # the bytes at the window's end that have tokens of their own

    def feed(self, token_id: int) -> str:
        """Take a new token; the text that is final now, without half characters."""
        if (byte := self._byte_tokens.get(token_id)) is not None:
            self._window.append(token_id)
            self._run.append(byte)
            return ""
        if self._run and self._says_nothing(token_id):
            return ""  # a run goes on behind it
        self._run.clear()
        text = self._decode([*self._window, token_id])
        if text == self._text and self._says_nothing(token_id):
            return ""  # it would fill the window
        self._window.append(token_id)
        self._text = text
        end = len(text.rstrip(INCOMPLETE))
        piece = text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        if end == len(text):
            self._move_up()
        elif len(self._window) > LONGEST_WAIT:
            piece += self._give_up_on_old_bytes()
        return piece

    def finish(self, token_ids: list[int]) -> str:
        """Take the last tokens, none or many; all text not yet given, incomplete characters included."""
        self._window += token_ids
        self._run.clear()
        piece = self.rest()
        self._num_given += len(piece)
        return piece

    def rest(self) -> str:
        """All text not yet given, if there are no more tokens."""
        return self._decode(self._window)[self._num_given :]

    @property
    def pending(self) -> str:
        """The whole characters of a run of bytes that may go on, as long as all of it since the prompt is such."""
        try:
            return self._run.decode()
        except UnicodeDecodeError as error:
            is_cut = error.end == len(self._run) and error.reason == "unexpected end of data"
            return self._run[: error.start].decode() if is_cut else ""

    def _decode(self, token_ids: list[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _says_nothing(self, token_id: int) -> bool:
        """True of special tokens that are left out. A space alone is lost at the beginning, two are not."""
        return self._decode([token_id, token_id]) == ""

    def _move_up(self) -> None:
        """Shorten a window whose text is final."""
        if len(self._window) > WINDOW:
            del self._window[: -WINDOW // 2]
            self._text = self._decode(self._window)
            self._num_given = len(self._text)

    def _give_up_on_old_bytes(self) -> str:
        """Shorten a window without a border between characters at its end; the text that falls out of it.

        It is cut where no bytes belong together: then the two parts have the characters of the whole.
        """
        for num_kept in range(1, LONGEST_CHARACTER + 1):
            old, kept = self._decode(self._window[:-num_kept]), self._decode(self._window[-num_kept:])
            if old + kept == self._text:
                piece = old[self._num_given :]
                del self._window[:-num_kept]
                self._text, self._num_given = kept, 0
                return piece
        return ""

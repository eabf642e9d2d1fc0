"""Text piece by piece with the decoders that models use, against decoding everything at once."""

import random
from typing import Any

import pytest

from kvshard.runtime.coordinator.detokenizer import INCOMPLETE, LONGEST_WAIT, WINDOW, Detokenizer

from .toy_tokenizers import (
    BYTE_TOKENS,
    TEXTS,
    TOKENIZERS,
    byte_alphabet,
    byte_ids,
    encode,
    make_detokenizer,
    random_ids,
    whole_text,
)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("seed", range(15))
def test_any_tokens_give_the_text_of_the_whole(kind: str, seed: int, skip_special_tokens: bool) -> None:
    chance = random.Random(seed)
    prompt = random_ids(kind, chance, chance.choice([0, 1, 3, 10]))
    ids = random_ids(kind, chance, 150)
    whole = whole_text(kind, prompt, ids, skip_special_tokens)
    detokenizer = make_detokenizer(kind, prompt, skip_special_tokens=skip_special_tokens)
    text = ""
    for count, token in enumerate(ids, start=1):
        text += detokenizer.feed(token)
        assert whole.startswith(text)
        assert text + detokenizer.rest() == whole_text(kind, prompt, ids[:count], skip_special_tokens)
    assert text + detokenizer.finish([]) == whole
    at_once = make_detokenizer(kind, prompt, skip_special_tokens=skip_special_tokens)
    assert at_once.finish(ids) == whole


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("seed", range(6))
def test_pieces_join_to_the_text(kind: str, seed: int) -> None:
    tokenizer, chance = TOKENIZERS[kind], random.Random(seed)
    text = "".join(chance.choice(TEXTS) for _ in range(8))
    prompt = encode(tokenizer, "Plain words", chance)
    ids = encode(tokenizer, text, chance)
    detokenizer = make_detokenizer(kind, prompt)
    pieces = [detokenizer.feed(token) for token in ids]
    assert INCOMPLETE not in "".join(pieces)
    assert "".join(pieces) + detokenizer.finish([]) == text
    assert make_detokenizer(kind, prompt).finish(ids) == text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_are_left_out_and_words_keep_their_space(kind: str) -> None:
    tokenizer, chance = TOKENIZERS[kind], random.Random(0)
    special = tokenizer.get_vocab_size() - 1
    ids = encode(tokenizer, " words and", chance)
    detokenizer = make_detokenizer(kind, encode(tokenizer, " Plain", chance))
    text = "".join(detokenizer.feed(token) for token in [*ids, *[special] * 50, *ids, special])
    assert text + detokenizer.finish([]) == " words and words and"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_characters_are_seen_as_soon_as_they_are_complete(kind: str) -> None:
    """Where their bytes might turn out to be no characters in the end, they are pending until then."""
    detokenizer = make_detokenizer(kind, [])
    text, seen = "", []
    for token in byte_ids(kind, "aé😀b"):
        text += detokenizer.feed(token)
        seen.append(text + detokenizer.pending)
    assert seen == ["a", "a", "aé", "aé", "aé", "aé", "aé😀", "aé😀b"]
    assert text == ("aé😀b" if kind == "byte-level" else "")
    assert text + detokenizer.feed(TOKENIZERS[kind].token_to_id("ords")) == "aé😀bords"
    assert detokenizer.pending == ""


def test_nothing_is_pending_of_bytes_that_make_no_characters() -> None:
    detokenizer = make_detokenizer("sentencepiece", [])
    pending = []
    for byte in b"a\xc3\xa9\xffb":
        detokenizer.feed(byte)
        pending.append(detokenizer.pending)
    assert pending == ["a", "a", "aé", "", ""]
    assert detokenizer.rest() == INCOMPLETE * 5


def test_bytes_that_never_make_a_character_are_shown_and_end() -> None:
    """A run of invalid bytes neither holds back text for ever nor makes the window grow."""
    tokenizer = TOKENIZERS["byte-level"]
    invalid, word = tokenizer.token_to_id(byte_alphabet()[0xFF]), tokenizer.token_to_id("ords")
    detokenizer = make_detokenizer("byte-level", [word])
    text = ""
    for token in [invalid] * (3 * LONGEST_WAIT) + [word]:
        text += detokenizer.feed(token)
        assert len(detokenizer._window) <= LONGEST_WAIT
    assert text + detokenizer.finish([]) == INCOMPLETE * (3 * LONGEST_WAIT) + "ords"


@pytest.mark.parametrize("num_invalid", range(LONGEST_WAIT - 6, LONGEST_WAIT + 2))
def test_a_character_behind_a_long_run_of_invalid_bytes_stays_whole(num_invalid: int) -> None:
    """The window is cut when it gets too long, which may be in the middle of the character."""
    tokenizer = TOKENIZERS["byte-level"]
    ids = [tokenizer.token_to_id(byte_alphabet()[0xFF])] * num_invalid + byte_ids("byte-level", "😀")
    detokenizer = make_detokenizer("byte-level", [])
    assert "".join(detokenizer.feed(token) for token in ids) == INCOMPLETE * num_invalid + "😀"


def test_a_half_character_at_the_end_is_shown() -> None:
    detokenizer = make_detokenizer("sentencepiece", [])
    assert [detokenizer.feed(byte) for byte in b"ab\xc3"] == [""] * 3  # valid as a whole or not at all
    assert detokenizer.finish([]) == INCOMPLETE * 3


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.num_decoded = 0
        self._tokenizer = tokenizer

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        self.num_decoded += len(token_ids)
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))


@pytest.mark.parametrize("what", ["words", "specials", "bytes", "bytes and words"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_cost_is_linear_in_the_tokens(kind: str, what: str) -> None:
    tokenizer = Counting(TOKENIZERS[kind])
    detokenizer = Detokenizer(tokenizer, byte_ids(kind, "Plain words" * 50), BYTE_TOKENS[kind])
    word = TOKENIZERS[kind].token_to_id("ords")
    letters = byte_ids(kind, "日é\x80")
    ids = {
        "words": [word] * 3000,
        "specials": [TOKENIZERS[kind].get_vocab_size() - 1] * 3000,
        "bytes": letters * 500,
        "bytes and words": [*letters, word] * 400,
    }[what]
    for token in ids:
        detokenizer.feed(token)
    detokenizer.finish([])
    assert tokenizer.num_decoded < 1.5 * WINDOW * len(ids) + 100

"""Text piece by piece with the decoders that models use, against decoding everything at once."""

import random
from types import ModuleType

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvshard.runtime.coordinator.detokenizer import LONGEST_WAIT, Detokenizer

TEXTS = [
    "Plain words, and more of them. ",
    "naïve café — “quoted” … ",
    "日本語のテキスト、한국어 글。",
    "👩‍👩‍👧‍👦 family 🇫🇷 flags 🏳️‍🌈 😀😀😀",
    "\n\n  def f(x):\n\treturn x\n",
]


def _byte_level() -> Tokenizer:
    """One token a byte, and some of several bytes, borders in the middle of characters included."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = ["é", " w", "ords", "日本", "😀"]
    byte_texts = [text.encode() for text in joined]
    pieces = [*byte_texts, "é😀".encode()[1:4], "😀😀".encode()[2:6], "日本".encode()[2:5]]
    byte_to_char = _byte_alphabet()
    vocab = {char: index for index, char in enumerate(alphabet)}
    for piece in pieces:
        vocab["".join(byte_to_char[byte] for byte in piece)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _sentencepiece() -> Tokenizer:
    """Words that begin with ▁, and bytes for the rest, as in Llama 2."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in ["▁Plain", "▁words", "▁", "w", "ords", ",", "▁and", "é", "日", "▁more", "."]:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def _encode(tokenizer: Tokenizer, text: str, chance: random.Random) -> list[int]:
    """A random way to write `text`, as a model may choose any."""
    sentencepiece = tokenizer.token_to_id("<0x00>") is not None
    alphabet = _byte_alphabet()
    pieces: dict[bytes, list[int]] = {}
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items():
        if sentencepiece:
            written = bytes([index]) if index < 256 else token.replace("▁", " ").encode()
        else:
            written = bytes(byte for char in token for byte, shown in alphabet.items() if shown == char)
        pieces.setdefault(written, []).append(index)
    data, ids, at = text.encode(), [], 0
    while at < len(data):
        fitting = [index for piece in pieces if data.startswith(piece, at) for index in pieces[piece]]
        ids.append(chance.choice(fitting))
        token = tokenizer.id_to_token(ids[-1])
        at += next(len(piece) for piece, indices in pieces.items() if ids[-1] in indices)
        assert token is not None
    return ids


TOKENIZERS = {"byte-level": _byte_level(), "sentencepiece": _sentencepiece()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("seed", range(12))
def test_pieces_join_to_the_text(kind: str, seed: int) -> None:
    tokenizer, chance = TOKENIZERS[kind], random.Random(seed)
    text = "".join(chance.choice(TEXTS) for _ in range(8))
    prompt = _encode(tokenizer, "Plain words, ", chance)
    ids = _encode(tokenizer, text, chance)
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces = [detokenizer.feed([token]) for token in ids]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) + detokenizer.finish([]) == text
    assert Detokenizer(tokenizer, prompt).finish(ids) == text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_are_left_out_and_words_keep_their_space(kind: str) -> None:
    tokenizer, chance = TOKENIZERS[kind], random.Random(0)
    special = tokenizer.get_vocab_size() - 1
    ids = _encode(tokenizer, " words and", chance)
    detokenizer = Detokenizer(tokenizer, _encode(tokenizer, " Plain", chance))
    text = "".join(detokenizer.feed([token]) for token in [*ids, special, *ids, special])
    assert text == " words and words and"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_characters_come_as_soon_as_they_are_complete(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    to_token = {byte: byte for byte in range(256)}
    if kind == "byte-level":
        to_token = {byte: tokenizer.token_to_id(char) for byte, char in _byte_alphabet().items()}
    detokenizer = Detokenizer(tokenizer, [])
    pieces = [detokenizer.feed([to_token[byte]]) for byte in "aé😀b".encode()]
    assert pieces == ["a", "", "é", "", "", "", "😀", "b"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_that_never_make_a_character_are_shown_and_end(kind: str) -> None:
    """A run of invalid bytes neither holds back text for ever nor makes the window grow."""
    tokenizer = TOKENIZERS[kind]
    invalid = 0xFF if kind == "sentencepiece" else tokenizer.token_to_id(_byte_alphabet()[0xFF])
    word = tokenizer.token_to_id("ords")
    detokenizer = Detokenizer(tokenizer, [word])
    ids = [invalid] * (3 * LONGEST_WAIT) + [word]
    text = ""
    for token in ids:
        text += detokenizer.feed([token])
        assert len(detokenizer._window) <= LONGEST_WAIT
    assert text + detokenizer.finish([]) == "\N{REPLACEMENT CHARACTER}" * (3 * LONGEST_WAIT) + "ords"


def test_a_half_character_at_the_end_is_shown() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    detokenizer = Detokenizer(tokenizer, [])
    assert detokenizer.feed(list(b"ab\xc3")) == ""  # one run of bytes: valid as a whole or not at all
    assert detokenizer.finish([]) == "\N{REPLACEMENT CHARACTER}" * 3


def test_cost_is_linear_in_the_tokens(fake: ModuleType) -> None:
    class Counting(fake.LetterTokenizer):  # type: ignore[misc]
        num_decoded = 0

        def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
            self.num_decoded += len(token_ids)
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    tokenizer = Counting()
    detokenizer = Detokenizer(tokenizer, list(range(90)) * 100)
    for _ in range(3000):
        detokenizer.feed([7])
    assert tokenizer.num_decoded < 20 * 3000

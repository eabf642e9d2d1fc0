"""Small tokenizers with the decoders that models use, and token sequences for them."""

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvshard.runtime.coordinator.detokenizer import CONTEXT, Detokenizer

TEXTS = [
    "Plain words, and more of them. ",
    "naïve café — “quoted” … ",
    "日本語のテキスト、한국어 글。",
    "👩‍👩‍👧‍👦 family 🇫🇷 flags 🏳️‍🌈 😀😀😀",
    "\n\n  def f(x):\n\treturn x\n",
]


PIECES = ["▁Plain", "▁words", "▁", "w", "ords", ",", "▁and", "é", "日", "▁more", "."]


def _byte_level() -> Tokenizer:
    """One token a byte, and some of several bytes, borders in the middle of characters included."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = ["é", " w", "ords", "日本", "😀"]
    byte_texts = [text.encode() for text in joined]
    pieces = [*byte_texts, "é😀".encode()[1:4], "😀😀".encode()[2:6], "日本".encode()[2:5]]
    byte_to_char = byte_alphabet()
    vocab = {char: index for index, char in enumerate(alphabet)}
    for piece in pieces:
        vocab["".join(byte_to_char[byte] for byte in piece)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _sentencepiece() -> Tokenizer:
    """Words that begin with ▁, and bytes for the rest, as in Llama 2."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in PIECES:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def _unigram() -> Tokenizer:
    """The same tokens in the other kind of sentencepiece model, with the decoder of newer conversions."""
    vocab = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)] + [(piece, -1.0) for piece in PIECES]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, chance: random.Random) -> list[int]:
    """A random way to write `text`, as a model may choose any."""
    sentencepiece = tokenizer.token_to_id("<0x00>") is not None
    alphabet = byte_alphabet()
    pieces: dict[bytes, list[int]] = {}
    vocab = sorted(tokenizer.get_vocab(with_added_tokens=False).items())  # else in any order
    for token, index in vocab:
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


TOKENIZERS = {"byte-level": _byte_level(), "sentencepiece": _sentencepiece(), "unigram": _unigram()}
BYTE_TOKENS: dict[str, dict[int, int]] = {
    kind: {} if kind == "byte-level" else {byte: byte for byte in range(256)} for kind in TOKENIZERS
}


def make_detokenizer(kind: str, prompt: list[int], *, skip_special_tokens: bool = True) -> Detokenizer:
    return Detokenizer(TOKENIZERS[kind], prompt, BYTE_TOKENS[kind], skip_special_tokens=skip_special_tokens)


def whole_text(kind: str, prompt: list[int], ids: list[int], skip_special_tokens: bool) -> str:
    """What `ids` add to the text of the end of the prompt."""
    end = prompt[-CONTEXT:]
    before, text = (
        TOKENIZERS[kind].decode(tokens, skip_special_tokens=skip_special_tokens)
        for tokens in (end, end + ids)
    )
    return str(text[len(before) :])


def random_ids(kind: str, chance: random.Random, count: int) -> list[int]:
    """Any tokens: single bytes, which are seldom characters; whole words; special ones."""
    size = TOKENIZERS[kind].get_vocab_size()
    num_bytes = 256 if kind != "byte-level" else size // 2
    runs = [
        lambda: [chance.randrange(num_bytes) for _ in range(chance.randrange(1, 6))],
        lambda: [chance.randrange(num_bytes, size) for _ in range(chance.randrange(1, 9))],
        lambda: [size - 1] * chance.choice([1, 2, 20]),
        lambda: encode(TOKENIZERS[kind], chance.choice(TEXTS), chance),
        lambda: byte_ids(kind, chance.choice(TEXTS[1:4])[: chance.randrange(1, 30)]),
    ]
    ids: list[int] = []
    while len(ids) < count:
        ids += chance.choice(runs)()
    return ids[:count]


def byte_ids(kind: str, text: str) -> list[int]:
    """A token for each byte."""
    if kind != "byte-level":
        return list(text.encode())
    return [TOKENIZERS[kind].token_to_id(byte_alphabet()[byte]) for byte in text.encode()]

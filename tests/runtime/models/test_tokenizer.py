"""Tokenizers: the GGUF one is converted once and splits text as the model was trained; others load as they are."""

import random
import shutil
from pathlib import Path

import pytest
from models_factory import make_gguf, make_llama, make_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kvshard.runtime.coordinator.detokenizer import Detokenizer
from kvshard.runtime.models import tokenizer as tokenizer_module
from kvshard.runtime.models.fields import CheckpointError
from kvshard.runtime.models.tokenizer import byte_tokens, load_tokenizer

CONVERSATION = [{"role": "user", "content": "What is 12 + 7?"}]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def demo_tokenizer(demo_model: Path, cache: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(demo_model, None, cache)


def test_the_demo_tokenizer_is_the_models(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(demo_tokenizer) == 49152
    assert (demo_tokenizer.eos_token_id, demo_tokenizer.bos_token_id) == (2, 1)
    text = "Numbers:\n\n1. 2024 caf\u00e9s \U0001f642"
    assert demo_tokenizer.decode(demo_tokenizer.encode(text)) == text
    # As the model's own tokenizer splits: digits one by one and apart from the blank lines before them.
    assert demo_tokenizer.tokenize("a\n\n12  3") == ["a", "\u010a\u010a", "1", "2", "\u0120\u0120", "3"]


def test_any_of_its_tokens_one_by_one_give_the_text_of_the_whole(
    demo_tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert byte_tokens(demo_tokenizer) == {}
    chance = random.Random(0)
    texts = ["caf\u00e9 \U0001f642 \u65e5\u672c\u8a9e, 12 + 7.", " don't", "\n\n  x"]
    for skip_special_tokens in (True, False):
        ids: list[int] = []
        while len(ids) < 600:
            ids += demo_tokenizer.encode(chance.choice(texts))
            ids += [chance.randrange(49152) for _ in range(3)] + [chance.randrange(20)]
        prompt, ids = ids[:5], ids[5:]
        detokenizer = Detokenizer(demo_tokenizer, prompt, {}, skip_special_tokens=skip_special_tokens)
        text = "".join(detokenizer.feed(token) for token in ids) + detokenizer.finish([])
        before, whole = (
            demo_tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
            for tokens in (prompt, prompt + ids)
        )
        assert before + text == whole


def test_the_tokens_of_bytes_are_found() -> None:
    vocab = {"<unk>": 0, "a": 1, **{f"<0x{byte:02X}>": 300 - byte for byte in range(256)}, "<0x100>": 2}
    model = models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>")
    found = byte_tokens(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)))
    assert found == {300 - byte: byte for byte in range(256)}


def test_the_chat_template_comes_along(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    text = demo_tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nWhat is 12 + 7?<|im_end|>\n<|im_start|>assistant\n")
    assert demo_tokenizer.encode(text)[0] == demo_tokenizer.encode(text, add_special_tokens=False)[0] == 1


def test_the_second_load_converts_nothing(
    demo_tokenizer: PreTrainedTokenizerFast, demo_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        pytest.fail(f"converted {path} again")

    monkeypatch.setattr(tokenizer_module, "_convert", fail)
    again = load_tokenizer(demo_model, None, cache)
    text = again.apply_chat_template(CONVERSATION, tokenize=False)
    assert text == demo_tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert again.encode(text) == demo_tokenizer.encode(text)
    assert [path.name[0] for path in (cache / "tokenizers").iterdir()].count(".") == 0, "scratch folders left"


def test_other_metadata_is_another_cache_entry(
    demo_tokenizer: PreTrainedTokenizerFast, demo_model: Path, cache: Path, tmp_path: Path
) -> None:
    """The key is the file's content: a renamed copy hits, a changed chat template misses."""
    header = demo_model.read_bytes()
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(header)
    load_tokenizer(renamed, None, cache)
    assert len(list((cache / "tokenizers").iterdir())) == 1
    renamed.write_bytes(header.replace(b"helpful AI", b"hostile AI", 1))
    other = load_tokenizer(renamed, None, cache)
    assert "hostile AI" in other.apply_chat_template(CONVERSATION, tokenize=False)
    assert len(list((cache / "tokenizers").iterdir())) == 2


def test_a_directory_and_an_override(
    demo_tokenizer: PreTrainedTokenizerFast, demo_model: Path, tmp_path: Path
) -> None:
    model = make_llama(tmp_path / "model")
    demo_tokenizer.save_pretrained(tmp_path / "tokenizer")
    overridden = load_tokenizer(model, str(tmp_path / "tokenizer"), tmp_path)
    shutil.copytree(tmp_path / "tokenizer", model, dirs_exist_ok=True)
    own = load_tokenizer(model, None, tmp_path)
    for tokenizer in (overridden, own):
        assert tokenizer.encode("a\n\n12") == demo_tokenizer.encode("a\n\n12")
        assert tokenizer.chat_template == demo_tokenizer.chat_template


def test_a_model_without_a_tokenizer_says_what_to_set(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model")
    with pytest.raises(
        CheckpointError, match=r"no tokenizer could be loaded from .*model: .*; set `tokenizer`"
    ):
        load_tokenizer(model, None, tmp_path)
    bare = make_gguf(tmp_path / "bare.gguf", make_model(head_dim=16))
    with pytest.raises(CheckpointError, match=r"bare\.gguf: its tokenizer could not be converted"):
        load_tokenizer(bare, None, tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer .*none\.gguf does not exist"):
        load_tokenizer(model, str(tmp_path / "none.gguf"), tmp_path)

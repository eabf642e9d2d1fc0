"""Special tokens are added once, whatever form a prompt has."""

from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from kvshard.runtime.errors import RequestError
from kvshard.runtime.models.prompt import check_token_ids, tokenize_bad_words, tokenize_prompt
from kvshard.runtime.sampling_params import SamplingParams

WORDS = {"<s>": 0, "user:": 1, "hello": 2, "assistant:": 3, "<unk>": 4}
MESSAGES = [{"role": "user", "content": "hello"}]
TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One that puts BOS before every text, and whose chat template writes BOS itself, as Llama's do."""
    backend = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made


def test_a_text_gets_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenize_prompt(tokenizer, 5, "a", "hello hello") == [0, 2, 2]


def test_messages_get_no_second_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenize_prompt(tokenizer, 5, "a", MESSAGES) == [0, 1, 2, 3]
    assert tokenize_prompt(tokenizer, 5, "a", MESSAGES, for_answer=False) == [0, 1, 2]


def test_token_ids_are_taken_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenize_prompt(tokenizer, 5, "a", [4, 0, 4]) == [4, 0, 4]


@pytest.mark.parametrize("token_id", [-1, 5])
def test_a_token_id_outside_the_vocabulary_is_refused(
    tokenizer: PreTrainedTokenizerFast, token_id: int
) -> None:
    with pytest.raises(
        RequestError, match=rf'request "a": token id {token_id} is not in the vocabulary of 5'
    ):
        tokenize_prompt(tokenizer, 5, "a", [1, token_id])


@pytest.mark.parametrize("prompt", ["hello", [{"role": "user", "content": "hello"}]])
def test_a_tokenizer_that_knows_more_than_its_model(
    tokenizer: PreTrainedTokenizerFast, prompt: str | list[dict[str, str]]
) -> None:
    with pytest.raises(RequestError, match=r'request "a": token id \d is not in the vocabulary of 1'):
        tokenize_prompt(tokenizer, 1, "a", prompt)


def test_messages_without_a_template_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(RequestError, match="no chat template; set chat_template or send a prompt"):
        tokenize_prompt(tokenizer, 5, "a", MESSAGES)


def test_a_template_that_refuses_fails_the_row_only(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="the chat template refused it: roles must alternate"):
        tokenize_prompt(tokenizer, 5, "a", MESSAGES)


@pytest.fixture
def spaces() -> PreTrainedTokenizerFast:
    """One to which a space before a word matters, as to byte-level ones: _ is the space."""
    words = {"a": 0, "_a": 1, "b": 2, "_b": 3, "_": 4}
    backend = Tokenizer(BPE(words, [("_", "a"), ("_", "b")]))
    backend.normalizer = Replace(" ", "_")
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("words", "sequences"),
    [
        (("a",), {(0,), (1,)}),
        ((" a", "a"), {(0,), (1,)}),
        (("ab",), {(0, 2), (1, 2)}),
        (("a b",), {(0, 3), (1, 3)}),
        (("_a",), {(1,)}),  # after a space it has one token more
        ((), set()),
    ],
)
def test_bad_words_with_and_without_a_space(
    spaces: PreTrainedTokenizerFast, words: tuple[str, ...], sequences: set[tuple[int, ...]]
) -> None:
    got = tokenize_bad_words(spaces, 5, "a", words)
    assert set(got) == sequences
    assert len(got) == len(sequences)


def test_bad_words_get_no_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenize_bad_words(tokenizer, 5, "a", ["hello hello"]) == ((2, 2),)


@pytest.mark.parametrize(
    ("words", "vocab_size", "message"),
    [
        (["a", "x"], 5, "bad_words: 'x' has no tokens; leave it out"),
        (["b"], 3, "token id 3 is not in the vocabulary of 3"),
    ],
)
def test_bad_words_that_cannot_be_banned(
    spaces: PreTrainedTokenizerFast, words: list[str], vocab_size: int, message: str
) -> None:
    with pytest.raises(RequestError, match=f'request "a": {message}'):
        tokenize_bad_words(spaces, vocab_size, "a", words)


@pytest.mark.parametrize("fields", [{"logit_bias": {3: 1.0, 5: 2.0}}, {"allowed_token_ids": (5, 0)}])
def test_settings_that_name_a_token_outside_the_vocabulary(fields: dict[str, Any]) -> None:
    check_token_ids(SamplingParams(**fields), 6, "a")
    name = next(iter(fields))
    with pytest.raises(RequestError, match=f'request "a": {name}: token id 5 is not in the vocabulary of 5'):
        check_token_ids(SamplingParams(**fields), 5, "a")

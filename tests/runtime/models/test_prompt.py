"""Special tokens are added once, whatever form a prompt has."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from kvshard.runtime.errors import RequestError
from kvshard.runtime.models.prompt import tokenize_prompt

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


def test_messages_without_a_template_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(RequestError, match="no chat template; set chat_template or send a prompt"):
        tokenize_prompt(tokenizer, 5, "a", MESSAGES)


def test_a_template_that_refuses_fails_the_row_only(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="the chat template refused it: roles must alternate"):
        tokenize_prompt(tokenizer, 5, "a", MESSAGES)

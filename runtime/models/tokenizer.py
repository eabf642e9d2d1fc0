"""Tokenizers: those of Hugging Face directories as they are, those of GGUF files converted once and cached."""

import hashlib
import importlib.metadata
import os
import tempfile
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from . import gguf_file
from .fields import CheckpointError

CONVERSION = "1"  # raise it when `_convert` changes: part of the cache key


def load_tokenizer(model_path: Path, override: str | None, cache: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model directory or `.gguf` file, with its chat template if it has one.

    `override` names another one: a directory, a `.gguf` file or a hub id. Converting a GGUF tokenizer takes seconds,
    so the result is kept in `cache`/tokenizers by the hash of the file's header. Raises CheckpointError.
    """
    source = str(model_path) if override is None else os.path.expanduser(override)
    path = Path(source)
    if path.suffix == ".gguf":
        return _from_gguf(path, cache)
    from transformers import AutoTokenizer  # takes 2 s to import, and is not needed for GGUF files

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=path.exists())
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"no tokenizer could be loaded from {source}: {reason}; set `tokenizer`"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(
            f"tokenizer of {source} is a {type(tokenizer).__name__}, which has no tokenizer.json; set `tokenizer`"
        )
    # Some directories ask for it: it takes spaces before punctuation out of texts, also of those that are code.
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def byte_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, int]:
    """Token id to byte of the tokens that stand for single bytes, as sentencepiece has them: <0x00> to <0xFF>."""
    # Not its get_vocab(), megabytes of strings and numbers whose room Python keeps.
    token_id = tokenizer.backend_tokenizer.token_to_id
    ids = ((token_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
    return {token: byte for token, byte in ids if token is not None}


def _from_gguf(path: Path, cache: Path) -> PreTrainedTokenizerFast:
    if not path.is_file():
        raise CheckpointError(f"tokenizer {path} does not exist")
    folder = cache / "tokenizers" / _header_hash(path)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
            converted = Path(scratch) / "tokenizer"
            _convert(path).save_pretrained(converted)
            _publish(converted, folder)
    return _loaded(PreTrainedTokenizerFast.from_pretrained(folder))


def _header_hash(path: Path) -> str:
    """Of everything the conversion depends on: the file's metadata and the converting code."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{CONVERSION} transformers {importlib.metadata.version('transformers')}\n".encode())
    with path.open("rb") as file:
        digest.update(file.read(gguf_file.read_header(path).num_bytes))
    return digest.hexdigest()


def _convert(path: Path) -> PreTrainedTokenizerFast:
    try:
        tokenizer = _loaded(PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: its tokenizer could not be converted ({error}); set `tokenizer`"
        ) from error
    if gguf_file.read_header(path).metadata.get("tokenizer.ggml.pre") == "smollm":
        # SmolLM splits off every digit first; transformers 5.23 knows other rules by this key but not this one,
        # and without it "\n\n1." becomes other tokens than the model was trained on.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _loaded(tokenizer: object) -> PreTrainedTokenizerFast:
    assert isinstance(tokenizer, PreTrainedTokenizerFast), f"transformers gave a {type(tokenizer).__name__}"
    return tokenizer


def _publish(converted: Path, folder: Path) -> None:
    """Rename into place; if another process was faster, its equal result stays."""
    try:
        converted.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise

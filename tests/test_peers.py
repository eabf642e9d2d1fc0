"""What benchmarks/peers.py does besides measuring: names of engines, and whether they gave the same tokens."""

from __future__ import annotations

import sys

import pytest
from peer_engines.known import KINDS, Chosen, Kind, installed, parse
from peer_engines.tokens import Agreement, Difference, compare, digest
from peers import COMPARED, MEASURED


def test_names() -> None:
    assert parse("vllm") == Chosen("vllm", "vllm")
    assert parse("kvshard:3") == Chosen("kvshard:3", "kvshard", size=3)
    assert parse("ctranslate2:int8") == Chosen("ctranslate2:int8", "ctranslate2", weights="int8")
    assert {parse(name).kind for name in MEASURED.split(",")} == set(KINDS)
    assert all(parse(name).weights is None for name in COMPARED.split(","))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sglang", "no engine sglang; there are kvshard, vllm"),
        ("kvshard:0", "kvshard:0: after kvshard there can be a number of shards"),
        ("llamacpp:2", "llamacpp:2: after llamacpp there can be q8_0 or q4_1"),
        ("transformers:int8", "transformers:int8: after transformers there can be nothing"),
    ],
)
def test_a_name_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(name)


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "absent", Kind("no_such_module", ""))
    assert installed("kvshard", sys.executable)
    assert not installed("absent", sys.executable)
    with pytest.raises(OSError, match="No such file"):
        installed("llamacpp", "/no/such/python")


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ([[1, 2], [3, 4], [5]], Agreement(3, 3, None)),
        ([[1, 2], [3, 9], [6]], Agreement(1, 3, Difference(1, 1, 4, 9))),
        ([[1, 2], [3, 4], [5, 6]], Agreement(2, 3, Difference(2, 1, None, 6))),
        ([[1], [3, 4], [5]], Agreement(2, 3, Difference(0, 1, 2, None))),
    ],
)
def test_tokens_are_compared_request_by_request(got: list[list[int]], expected: Agreement) -> None:
    assert compare([[1, 2], [3, 4], [5]], got) == expected


def test_a_request_that_is_missing_is_no_agreement() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare([[1], [2]], [[1]])


def test_a_digest_tells_which_request_a_token_belongs_to() -> None:
    assert digest([[1, 2], [3]]) != digest([[1], [2, 3]])
    assert len(digest([[1]])) == 16

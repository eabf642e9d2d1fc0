"""What benchmarks/peers.py says of given samples and tokens. No engine is started."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
from peer_engines.known import KINDS, Chosen, parse
from peer_engines.process import Peer, PeerEnded
from peer_engines.workloads import WARM_UP, better_is_less, calls, figures


class FakePeer(Peer):
    """Says what `answer` says, in this process; notes what it is asked."""

    def __init__(self, chosen: Chosen, answer: Callable[[str, int], dict[str, Any]]) -> None:
        self.chosen, self.name = chosen, chosen.name
        self.version, self.load_s = "1.0", 0.5
        self.asked: list[tuple[str, int]] = []
        self.closed = False
        self._fake = answer

    def sample(self, workload: str, repeat: int, token_ids: bool = False) -> dict[str, Any]:
        self.asked.append((workload, repeat))
        return self._fake(workload, repeat)

    def close(self) -> None:
        self.closed = True


def idle(name: str) -> FakePeer:
    return FakePeer(parse(name), lambda workload, repeat: {"seconds": [1.0] * len(calls(workload, repeat))})


def sample(engine: str, workload: str, repeat: int, **figures: float) -> dict[str, Any]:
    return {"engine": engine, "workload": workload, "repeat": repeat, "copy_gb_s": 9.0, **figures}


def test_a_sample_becomes_its_workload_s_figures() -> None:
    assert figures("W1", 0, [0.1, 1.37]) == {"ttft_ms": 100.0, "tpot_ms": pytest.approx(10.0)}
    assert figures("W2", 0, [2.0]) == {"output_tokens_per_s": 1024.0}
    assert figures("W3", 0, [0.5]) == {"prompt_tokens_per_s": 4096.0}
    made = sum(calls("W4", 0)[0].max_tokens)
    assert figures("W4", 0, [4.0]) == {"output_tokens_per_s": made / 4}
    assert better_is_less("ttft_ms")
    assert better_is_less("tpot_ms")
    assert not better_is_less("output_tokens_per_s")


def test_all_engines_are_given_the_same_and_every_repeat_something_else() -> None:
    for workload in ("W1", "W2", "W3", "W4"):
        assert calls(workload, 1) == calls(workload, 1)
        own, other = calls(workload, 0), calls(workload, 1)
        assert [[len(p) for p in call.prompts] for call in own] == [
            [len(p) for p in call.prompts] for call in other
        ]
        assert [call.max_tokens for call in own] == [call.max_tokens for call in other]
        assert all(a.prompts != b.prompts for a, b in zip(own, other, strict=True))
    whole = calls("W4", 0)[0].prompts
    assert len({tuple(prompt[:512]) for prompt in whole}) == 1
    assert len({tuple(prompt) for prompt in whole}) == len(whole) == 512


def test_of_times_the_shorter_is_better_and_of_rates_the_higher() -> None:
    """Ratios are of the same repeat: their median is not that of the medians (40 / 15 and 75 / 200)."""
    values = {"kvshard": [(10.0, 300.0), (20.0, 100.0)], "vllm": [(20.0, 100.0), (60.0, 50.0)]}
    samples = [
        sample(engine, "W2", repeat, ttft_ms=time, output_tokens_per_s=rate)
        for engine, pairs in values.items()
        for repeat, (time, rate) in enumerate(pairs)
    ]
    head = ["| engine | median | range | kvshard beside it |", "|---|---|---|---|"]
    assert peers.tables(samples, [idle("kvshard"), idle("vllm")]) == [
        *("", "**W2, ttft_ms**", "", *head),
        "| kvshard | 15.00 | 10.00 - 20.00 |  |",
        "| vllm | 40.00 | 20.00 - 60.00 | 2.50x (2.00 - 3.00) |",
        *("", "**W2, output_tokens_per_s**", "", *head),
        "| kvshard | 200.00 | 100.00 - 300.00 |  |",
        "| vllm | 75.00 | 50.00 - 100.00 | 2.50x (2.00 - 3.00) |",
    ]


def test_who_is_worse_reads_below_one_and_the_first_engine_is_the_one_compared() -> None:
    samples = [
        sample(name, "W3", 0, prompt_tokens_per_s=rate) for name, rate in (("vllm", 30), ("kvshard", 40))
    ]
    lines = peers.tables(samples, [idle("vllm"), idle("kvshard")])
    assert lines[3] == "| engine | median | range | vllm beside it |"
    assert lines[6:] == ["| kvshard | 40.00 | 40.00 - 40.00 | 0.75x (0.75 - 0.75) |"]


def test_repeats_and_workloads_that_an_engine_lacks() -> None:
    """A repeat that the first engine has not is in the other's median, and in no ratio."""
    rates = {("kvshard", 0): 10, ("vllm", 0): 5, ("vllm", 1): 15, ("transformers", 1): 1}
    samples = [sample(name, "W4", i, output_tokens_per_s=rate) for (name, i), rate in rates.items()]
    lines = peers.tables(
        samples, [idle("kvshard"), idle("vllm"), idle("transformers"), idle("llamacpp:q4_1")]
    )
    assert [
        line for line in lines if line.startswith(("| kvshard", "| vllm", "| transformers", "| llamacpp"))
    ] == [
        "| kvshard | 10.00 | 10.00 - 10.00 |  |",
        "| vllm | 10.00 | 5.00 - 15.00 | 2.00x (2.00 - 2.00) |",
    ]
    reasons = [KINDS[kind].left_out["W4"] for kind in ("transformers", "llamacpp")]
    assert lines[-4:] == ["", f"Not transformers: {reasons[0]}.", "", f"Not llamacpp: {reasons[1]}."]


def test_engines_take_turns_and_one_that_ends_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "copy_rate", lambda threads: 7.0 * threads)

    def ends(workload: str, repeat: int) -> dict[str, Any]:
        if repeat == 1:
            raise PeerEnded("vllm ended with -11; the log says why")
        return {"seconds": [0.5]}

    first, ending, without = idle("kvshard"), FakePeer(parse("vllm"), ends), idle("transformers")
    samples = peers.measure([first, ending, without], ["W3", "W4"], 3, 2)
    assert first.asked == [(w, i) for w in ("W3", "W4") for i in (WARM_UP, 0, 1, 2)]
    assert ending.asked == [("W3", WARM_UP), ("W3", 0), ("W3", 1)]
    assert without.asked == [("W3", i) for i in (WARM_UP, 0, 1, 2)], "it is not given W4"
    assert [(s["workload"], s["repeat"]) for s in samples if s["engine"] == "kvshard"] == first.asked[
        1:4
    ] + first.asked[5:]
    (only,) = (s for s in samples if s["engine"] == "vllm")
    assert only == sample("vllm", "W3", 0, prompt_tokens_per_s=4096.0) | {"copy_gb_s": 14.0, "seconds": [0.5]}
    assert "vllm ended with -11" in capsys.readouterr().out


def run_gate(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    tokens: dict[str, list[list[int]]],
    absent: tuple[str, ...] = (),
) -> tuple[list[FakePeer], dict[str, Any]]:
    """`peers.py --gate` with engines that give these tokens; the samples it writes. Raises what it ends with."""
    started: list[FakePeer] = []

    def start(chosen: list[Chosen], *_: object) -> list[FakePeer]:
        for engine in chosen:
            ids = tokens[engine.name]
            started.append(FakePeer(engine, lambda workload, repeat, ids=ids: {"token_ids": [ids]}))
        return started

    monkeypatch.setattr(peers, "installed", lambda kind, python: kind not in absent)
    monkeypatch.setattr(peers, "start", start)
    output = folder / "tokens.json"
    monkeypatch.setattr(
        sys, "argv", ["peers.py", "--gate", "--engines", ",".join(tokens), "--output", str(output)]
    )
    try:
        peers.main()
    finally:
        assert all(peer.closed for peer in started)
    return started, json.loads(output.read_text())


TOKENS = [[1, 2], [3, 4]]


def test_the_gate_passes_engines_that_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started, written = run_gate(
        monkeypatch, tmp_path, {"kvshard": TOKENS, "kvshard:2": TOKENS, "vllm": TOKENS}
    )
    assert all(peer.asked == [("W2", 0)] for peer in started)
    assert written["arguments"]["dtype"] == "float32"
    assert [(s["engine"], s["equal"]) for s in written["samples"]] == [
        ("kvshard", 2),
        ("kvshard:2", 2),
        ("vllm", 2),
    ]
    assert len({tuple(s["requests"]) for s in written["samples"]}) == 1


def test_the_gate_ends_with_1_for_one_other_token_and_writes_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also when an engine after the one that differs agrees."""
    tokens = {"kvshard": TOKENS, "vllm": [[1, 2], [3, 9]], "transformers": TOKENS}
    with pytest.raises(SystemExit) as ended:
        run_gate(monkeypatch, tmp_path, tokens)
    assert ended.value.code == 1
    assert (tmp_path / "tokens.md").read_text().splitlines()[-4:] == [
        "|---|---|---|",
        "| kvshard | 2 of 2 |  |",
        "| vllm | 1 of 2 | request 1, token 1: 9 for 4 |",
        "| transformers | 2 of 2 |  |",
    ]


def test_the_gate_compares_nothing_when_an_engine_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        SystemExit, match="an engine that was asked for cannot run, so tokens are not compared"
    ):
        run_gate(monkeypatch, tmp_path, {"kvshard": TOKENS, "vllm": TOKENS}, absent=("vllm",))
    assert "left out: vllm is not installed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_gate_says_which_engine_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def ends(workload: str, repeat: int) -> dict[str, Any]:
        raise PeerEnded("vllm ended with 1; the log says why")

    monkeypatch.setattr(peers, "start", lambda *_: [FakePeer(parse("vllm"), ends)])
    monkeypatch.setattr(peers, "installed", lambda *_: True)
    monkeypatch.setattr(
        sys, "argv", ["peers.py", "--gate", "--engines", "vllm", "--output", str(tmp_path / "x.json")]
    )
    with pytest.raises(SystemExit, match="vllm ended with 1; the log says why"):
        peers.main()
    assert not list(tmp_path.iterdir())

"""Rows with several answers, with log probabilities of their prompt, and texts that are scored."""

import math
import threading
from pathlib import Path

from kvshard.runtime.batch.records import Row
from kvshard.runtime.sampling_params import SamplingParams

from .fakes import FakeEngine
from .run_job import SAMPLING, Watched, make_config, rows, run


def test_a_row_with_samples_is_one_line_when_all_have_ended(tmp_path: Path) -> None:
    sampling = SamplingParams(n=3, max_tokens=9, stop="D")
    source = [Row("a", "prompt", False, sampling), Row("b", "prompt", True, sampling)]
    engine, progress = FakeEngine(make_config(max_num_seqs=2)), Watched()
    summary, lines = run(tmp_path / "out.jsonl", iter(source), engine, progress=progress)
    by_id = {line["custom_id"]: line["response"]["body"] for line in lines}
    choices = by_id["a"]["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(0, "ABC"), (1, "BC"), (2, "C")]
    assert [choice["token_ids"] for choice in choices] == [[65, 66, 67, 68], [66, 67, 68], [67, 68]]
    assert [choice["message"]["content"] for choice in by_id["b"]["choices"]] == ["ABC", "BC", "C"]
    assert by_id["a"]["usage"] == {"prompt_tokens": 6, "completion_tokens": 9, "total_tokens": 15}
    assert len(lines) == summary.num_ok == 2
    assert (summary.num_prompt_tokens, summary.num_output_tokens, len(summary.ttft_ms)) == (12, 18, 6)
    assert progress.last == (2, 0, 18)


def test_a_row_one_of_whose_samples_fails_says_so_and_runs_again(tmp_path: Path) -> None:
    engine = FakeEngine(make_config())
    engine.executor.fails = lambda sample_index: sample_index == 1
    sampling = SamplingParams(n=3, max_tokens=3)
    source = [Row("bad", "x", False, sampling), Row("good", "x", False, SAMPLING)]
    summary, lines = run(tmp_path / "out.jsonl", iter(source), engine)
    assert (summary.num_ok, summary.num_failed) == (1, 1)
    [error] = [line["error"] for line in lines if line["custom_id"] == "bad"]
    assert error["type"] == "system_error"
    assert error["message"].startswith(
        "1 of 3 samples failed, the first at index 1: the model's logits are not"
    )
    summary, lines = run(tmp_path / "out.jsonl", iter(source))
    assert (summary.num_ok, summary.num_skipped) == (1, 1)
    assert [line["custom_id"] for line in lines] == ["good", "bad"]
    assert [choice["text"] for choice in lines[1]["response"]["body"]["choices"]] == ["ABC", "BCD", "CDE"]


def test_a_job_stopped_between_samples_writes_their_row_once(tmp_path: Path) -> None:
    """The first sample of every row has ended; none is lost, none comes twice."""
    engine, stop = FakeEngine(make_config(max_num_seqs=1)), threading.Event()
    sampling = SamplingParams(n=2, max_tokens=3)

    def stop_in_the_second_row() -> None:
        if engine.executor.num_results == 10:
            stop.set()

    engine.executor.on_step = stop_in_the_second_row
    summary, lines = run(tmp_path / "out.jsonl", rows(3, sampling), engine, stop)
    assert (summary.interrupted, [line["custom_id"] for line in lines]) == (True, ["r0"])
    summary, lines = run(tmp_path / "out.jsonl", rows(3, sampling))
    assert (summary.num_ok, summary.num_skipped) == (2, 1)
    assert [line["custom_id"] for line in lines] == ["r0", "r1", "r2"]
    assert {len(line["response"]["body"]["choices"]) for line in lines} == {2}


def test_log_probabilities_of_the_prompt(tmp_path: Path) -> None:
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=1)
    _, [line] = run(tmp_path / "out.jsonl", iter([Row("a", "hey", False, wanted)]))
    x = {"120": {"logprob": -1.5, "rank": 1, "decoded_token": "x"}}
    assert line["response"]["body"]["prompt_logprobs"] == [
        None,
        {"101": {"logprob": -0.5, "rank": 7, "decoded_token": "e"}} | x,
        {"121": {"logprob": -0.5, "rank": 7, "decoded_token": "y"}} | x,
    ]


def test_texts_are_scored(tmp_path: Path) -> None:
    engine, progress = FakeEngine(make_config("score")), Watched()
    source = [
        Row("text", "hey", False, SamplingParams()),
        Row("chat", [{"role": "user", "content": "hi"}] * 3, True, SamplingParams(prompt_logprobs=1)),
        Row("answer", "hey", False, SAMPLING),
        Row("short", "x", False, SamplingParams()),
    ]
    summary, lines = run(tmp_path / "out.jsonl", iter(source), engine, progress=progress)
    by_id = {line["custom_id"]: line for line in lines}
    body = by_id["text"]["response"]["body"]
    assert by_id["text"]["response"]["status_code"] == 200
    assert (body.pop("id")[:6], body.pop("created") > 0) == ("score-", True)
    assert body == {
        "object": "text_score",
        "model": "m",
        "logprob_sum": -1.0,
        "perplexity": math.exp(0.5),
        "prompt_token_ids": [104, 101, 121],
        "prompt_logprobs": [
            None,
            {"101": {"logprob": -0.5, "rank": 7, "decoded_token": "e"}},
            {"121": {"logprob": -0.5, "rank": 7, "decoded_token": "y"}},
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3},
    }
    assert len(by_id["chat"]["response"]["body"]["prompt_logprobs"][2]) == 2
    assert "temperature=0.0 has no meaning with task: score" in by_id["answer"]["error"]["message"]
    assert "the text is one token" in by_id["short"]["error"]["message"]
    assert (summary.num_ok, summary.num_failed, summary.num_prompt_tokens, summary.num_output_tokens) == (
        2,
        2,
        6,
        0,
    )
    assert (summary.num_scored_tokens, summary.logprob_sum) == (4, -2.0)
    assert progress.last == (4, 2, 6)

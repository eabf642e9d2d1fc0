"""The batch loop: every row answered or failed once, the coordinator kept busy, a clean stop."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvshard.runtime.batch.job import _Feeder
from kvshard.runtime.batch.records import BadRow, Row
from kvshard.runtime.errors import ConfigError, RequestError, ShardError
from kvshard.runtime.sampling_params import SamplingParams

from .fakes import FakeEngine
from .run_job import SAMPLING, Watched, make_config, rows, run


def test_every_row_is_answered_once(tmp_path: Path) -> None:
    engine, progress = FakeEngine(make_config()), Watched()
    summary, lines = run(tmp_path / "out.jsonl", rows(50), engine, progress=progress)
    assert sorted(line["custom_id"] for line in lines) == sorted(f"r{number}" for number in range(50))
    assert {line["response"]["body"]["choices"][0]["text"] for line in lines} == {"ABC"}
    assert (summary.num_ok, summary.num_failed, summary.interrupted) == (50, 0, False)
    assert (summary.num_prompt_tokens, summary.num_output_tokens) == (300, 150)
    assert len(summary.ttft_ms) == len(summary.tpot_ms) == 50
    assert progress.last == (50, 0, 150)
    assert not engine.coordinator.has_work
    # One row a slot at a time would take 50 * 3 steps at least; four slots kept full take a quarter.
    assert engine.executor.num_results < 50


def test_the_answer_of_a_completion(tmp_path: Path) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=9, stop="C", logprobs=1)
    _, [line] = run(tmp_path / "out.jsonl", iter([Row("é", [1, 2], False, sampling)]))
    body = line["response"]["body"]
    assert line["id"].startswith("batch_req_")
    assert line["error"] is None
    assert line["response"]["status_code"] == 200
    assert (body["object"], body["model"], body["id"][:5]) == ("text_completion", "m", "cmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "text": "AB",
            "finish_reason": "stop",
            "stop_reason": "C",
            "token_ids": [65, 66, 67],
            "logprobs": {
                "tokens": ["A", "B", "C"],
                "token_logprobs": [-1.0, -2.0, -3.0],
                "top_logprobs": [{"x": -1.5, "A": -1.0}, {"x": -1.5, "B": -2.0}, {"x": -1.5, "C": -3.0}],
            },
        }
    ]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


def test_the_answer_of_a_chat(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with_logprobs = SamplingParams(max_tokens=1, logprobs=2)
    source = iter([Row("a", messages, True, SAMPLING), Row("b", messages, True, with_logprobs)])
    _, lines = run(tmp_path / "out.jsonl", source)
    by_id = {line["custom_id"]: line["response"]["body"] for line in lines}
    assert by_id["a"]["object"] == "chat.completion"
    assert by_id["a"]["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "ABC"},
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": [65, 66, 67],
            "logprobs": None,
        }
    ]
    top = [{"token": "x", "logprob": -1.5}, {"token": "y", "logprob": -2.5}]
    content = [{"token": "A", "logprob": -1.0, "top_logprobs": top}]
    assert by_id["b"]["choices"][0]["logprobs"] == {"content": content}


def test_bad_rows_fail_and_the_others_go_on(tmp_path: Path) -> None:
    too_long = SamplingParams(max_tokens=1000)
    source: list[Row | BadRow] = [
        Row("a", "x", False, SAMPLING),
        BadRow("line-2", "invalid_line", "rows.jsonl line 2: not valid JSON"),
        Row("refused", "\0", False, SAMPLING),
        Row("long", "x" * 500, False, too_long),
        Row("long, many", "x" * 500, False, SamplingParams(n=3, max_tokens=1000)),
        Row("b", "x", False, SAMPLING),
    ]
    summary, lines = run(tmp_path / "out.jsonl", iter(source))
    errors = {line["custom_id"]: line["error"] for line in lines}
    assert errors.keys() == {"a", "line-2", "refused", "long", "long, many", "b"}
    assert errors["a"] is errors["b"] is None
    assert errors["line-2"] == {
        "code": "invalid_line",
        "message": "rows.jsonl line 2: not valid JSON",
        "type": "input_error",
    }
    assert errors["refused"]["code"] == "invalid_request"
    assert errors["refused"]["message"] == "this prompt cannot be tokenised"
    assert "500" in errors["long"]["message"]  # its numbers
    assert errors["long, many"]["message"] == errors["long"]["message"].replace('"long"', '"long, many"')
    assert all(line["response"] is None for line in lines if line["error"])
    assert (summary.num_ok, summary.num_failed) == (2, 4)


def test_finished_rows_are_skipped_before_they_are_tokenised(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run(path, rows(7))
    engine = FakeEngine(make_config())
    made = []
    real = engine.make_request
    engine.make_request = lambda row_id, *rest: made.append(row_id) or real(row_id, *rest)  # type: ignore
    summary, lines = run(path, rows(10), engine)
    assert made == ["r7", "r8", "r9"]
    assert (summary.num_ok, summary.num_skipped) == (3, 7)
    assert len({line["custom_id"] for line in lines}) == len(lines) == 10


def test_reading_stays_a_few_rows_ahead(tmp_path: Path) -> None:
    engine = FakeEngine(make_config())
    taken = 0
    seen = []

    def counted() -> Iterator[Row | BadRow]:
        nonlocal taken
        for row in rows(400):
            taken += 1
            yield row

    engine.executor.on_step = lambda: seen.append(taken)
    run(tmp_path / "out.jsonl", counted(), engine)
    finished_at_most = [4 * (step // 3 + 1) for step in range(len(seen))]
    # 4 slots, 4 waiting, 8 in the queue, one in each hand of the feeder.
    assert all(count <= done + 4 + 4 + 8 + 2 for count, done in zip(seen, finished_at_most, strict=True))


def test_a_stop_leaves_a_file_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    engine, stop = FakeEngine(make_config()), threading.Event()
    engine.executor.on_step = lambda: stop.set() if engine.executor.num_results == 8 else None
    summary, lines = run(path, rows(40), engine, stop)
    assert summary.interrupted
    assert 0 < len(lines) == summary.num_ok < 40
    assert engine.executor.num_results == 8  # not one step more
    assert not [thread for thread in threading.enumerate() if thread.name == "row-feeder"]
    again, lines = run(path, rows(40))
    assert not again.interrupted
    assert again.num_skipped == summary.num_ok
    assert sorted(line["custom_id"] for line in lines) == sorted(f"r{number}" for number in range(40))


def test_a_lost_shard_ends_the_job_and_keeps_what_is_done(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    engine = FakeEngine(make_config())
    engine.executor.lost_at_step = 8
    with pytest.raises(ShardError, match="shard 1 on node-b failed at step 8"):
        run(path, rows(40), engine)
    done = len(path.read_bytes().splitlines())
    assert 0 < done < 40
    summary, lines = run(path, rows(40))
    assert (summary.num_skipped, len(lines)) == (done, 40)


@pytest.mark.parametrize("error", [ConfigError("cannot read the input file"), RequestError("a bug of ours")])
@pytest.mark.parametrize("after", [0, 3])
def test_an_error_while_reading_ends_the_job(tmp_path: Path, error: Exception, after: int) -> None:
    def broken() -> Iterator[Row | BadRow]:
        yield from rows(after)
        raise error

    with pytest.raises(type(error), match=str(error)):
        run(tmp_path / "out.jsonl", broken())
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == after


def test_a_request_that_the_coordinator_gave_up_runs_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    engine = FakeEngine(make_config())
    real = engine.coordinator.step

    def step() -> list[Any]:
        ended = real()
        for request in ended:
            if request.request_id == "r1":
                request.error = "its logits are not numbers"
        return ended

    engine.coordinator.step = step  # type: ignore[method-assign]
    summary, lines = run(path, rows(3), engine)
    error = next(line["error"] for line in lines if line["custom_id"] == "r1")
    assert error == {
        "code": "request_failed",
        "message": "its logits are not numbers",
        "type": "system_error",
    }
    assert summary.num_failed == 1
    again, lines = run(path, rows(3))
    assert (again.num_ok, again.num_skipped) == (1, 2)
    assert [line["error"] for line in lines] == [None] * 3


def test_what_the_shards_used(tmp_path: Path) -> None:
    engine = FakeEngine(make_config())
    summary, _ = run(tmp_path / "out.jsonl", rows(4), engine)
    first, second = summary.shards
    blocks = engine.coordinator.stats.peak_used_layer_blocks
    assert blocks > 0
    assert (first.peak_kv_bytes, first.peak_memory_bytes) == (blocks * 2**20, 3 * 2**30)
    assert (second.peak_kv_bytes, second.peak_memory_bytes) == (blocks * 2**19, None)  # it did not answer


@pytest.mark.timeout(20)
@pytest.mark.parametrize("broken", [False, True])
def test_the_end_of_the_input_wakes_who_waits_for_a_row(broken: bool) -> None:
    """And what is asked next is told that there is no more, or why."""

    def none() -> Iterator[Row]:
        yield from ()
        if broken:
            raise ConfigError("cannot read the input file")

    with _Feeder(none(), set(), lambda row: pytest.fail("there are no rows"), 1) as feeder:
        assert feeder.get(threading.TIMEOUT_MAX) is None
        if broken:
            with pytest.raises(ConfigError, match="cannot read"):
                _ = feeder.exhausted
        else:
            assert feeder.exhausted

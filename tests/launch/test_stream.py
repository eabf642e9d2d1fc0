"""`generate` as a stream, over a fake engine."""

import gc
import signal
import threading
from collections.abc import Iterator

import pytest

from kvshard.launch.llm import LLM
from kvshard.runtime.errors import ConfigError, RequestError, ShardError
from kvshard.runtime.sampling_params import SamplingParams

from ..runtime.batch.fakes import FakeEngine
from .fake_llm import LONG, SHORT, assert_idle, engine_of, texts

pytestmark = pytest.mark.usefixtures("fake_engine")


def test_a_stream_gives_outputs_as_they_end() -> None:
    params = [SamplingParams(temperature=0, max_tokens=count) for count in (9, 1, 4)]
    with LLM(model="m") as llm:
        stream = llm.generate(["a", "b", "c"], params, stream=True)
        assert engine_of(llm).executor.num_results == 0
        outputs, num_results = [], []
        for output in stream:
            outputs.append(output)
            num_results.append(engine_of(llm).executor.num_results)
        assert_idle(llm)
    assert [output.prompt_index for output in outputs] == [1, 2, 0]
    assert [output.request_id for output in outputs] == ["1", "2", "0"]
    assert [output.prompt for output in outputs] == ["b", "c", "a"]
    assert [texts(output) for output in outputs] == [["A"], ["ABCD"], ["ABCDEFGHI"]]
    assert num_results == [1, 4, 9]


def test_what_was_sent_ahead_has_come_back_at_the_end() -> None:
    with LLM(model="m") as llm:
        [output] = llm.generate("a", SamplingParams(temperature=0, max_tokens=50, stop="C"))
        assert texts(output) == ["AB"]
        assert engine_of(llm).executor.num_results == 3 + 1
        assert_idle(llm)


@pytest.mark.parametrize("how", ["break", "close", "drop"])
def test_leaving_a_stream_aborts_what_is_left(how: str) -> None:
    with LLM(model="m", scheduler={"max_num_seqs": 3}) as llm:
        stream = llm.generate(["a", "b", "c", "d"], [LONG, SHORT, SamplingParams(n=2), LONG], stream=True)
        assert next(stream).prompt_index == 1
        num_results = engine_of(llm).executor.num_results
        if how == "close":
            stream.close()
        elif how == "drop":
            del stream
            gc.collect()
        else:
            for _ in stream:
                break
            del stream
        assert engine_of(llm).coordinator.num_waiting == engine_of(llm).coordinator.num_running == 0
        if how != "break":
            assert engine_of(llm).executor.num_results == num_results
        [again] = llm.generate("e", SHORT)
        assert (again.request_id, again.prompt_index, texts(again)) == ("4", 0, ["ABC"])
        assert_idle(llm)


def test_a_stream_never_begun_costs_nothing() -> None:
    with LLM(model="m") as llm:
        unused = llm.generate(["a"], LONG, stream=True)
        assert texts(llm.generate("b", SHORT)[0]) == ["ABC"]
        assert engine_of(llm).executor.num_results == 3
        assert_idle(llm)
        unused.close()


def test_calls_beside_an_open_stream() -> None:
    """Each gets its own outputs, whoever takes the step in which they end."""
    params = [SamplingParams(temperature=0, max_tokens=count) for count in (2, 4, 30)]
    with LLM(model="m") as llm:
        seen = []
        for output in llm.generate(["a", "b", "c"], params, stream=True):
            seen.append(output.prompt_index)
            [inner] = llm.generate("x", SHORT)
            assert texts(inner) == ["ABC"]
        assert_idle(llm)
    assert seen == [0, 1, 2]


def test_calls_from_several_threads() -> None:
    """Each has prompts of its own number of tokens."""
    results: dict[int, list[str]] = {}

    def call(count: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=count)
        outputs = llm.generate(["a"] * 20, params)
        results[count] = [output.outputs[0].text for output in outputs]

    with LLM(model="m") as llm:
        threads = [threading.Thread(target=call, args=(count,)) for count in (1, 3, 5, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert_idle(llm)
    assert results == {count: ["ABCDEFG"[:count]] * 20 for count in (1, 3, 5, 7)}


def test_a_call_gets_its_results_from_the_steps_of_another_thread() -> None:
    """The other one begins within the second step of a long call, and ends before that does."""
    order: list[str] = []

    def call_short() -> None:
        assert texts(llm.generate("b", SHORT)[0]) == ["ABC"]
        order.append("short")

    thread = threading.Thread(target=call_short)

    def begin_and_wait() -> None:
        executor = engine_of(llm).executor
        if executor.num_results == 2:
            thread.start()
            while not llm._running._new:
                pass
        elif executor.num_results == 2 + 1 + 3 + 1:  # its prompt joined the plan after the one in flight
            thread.join(60)

    with LLM(model="m") as llm:
        engine_of(llm).executor.on_step = begin_and_wait
        assert len(llm.generate("a", LONG)[0].outputs[0].token_ids) == 100
        order.append("long")
        thread.join(60)
        assert_idle(llm)
    assert order == ["short", "long"]


def test_a_stream_raises_as_generate_does() -> None:
    with LLM(model="m") as llm:
        with pytest.raises(RequestError, match=r"prompts\[1\]: .*500"):
            llm.generate(["good", "x" * 500], SHORT, stream=True)
        assert engine_of(llm).executor.num_results == 0
        stream, other = (llm.generate(["a", "b"], LONG, stream=True) for _ in range(2))
        engine_of(llm).executor.lost_at_step = 2
        for call in (stream, other):  # whoever took the step, all are told why
            with pytest.raises(ShardError, match="node-b"):
                next(call)
        assert engine_of(llm).executor.closed
        with pytest.raises(ConfigError, match="this LLM is closed"):
            llm.generate("a", SHORT, stream=True)


def test_a_stream_of_an_llm_that_is_closed_ends() -> None:
    with LLM(model="m") as llm:
        stream = llm.generate(["a", "b"], [SHORT, LONG], stream=True)
        next(stream)
    with pytest.raises(ConfigError, match="this LLM is closed"):
        next(stream)


@pytest.mark.parametrize("num_tokens", [5, 100])
def test_closing_waits_for_the_step_of_another_thread(num_tokens: int) -> None:
    """Its call ends with an error, or with its answers where that step gave the last of them."""
    llm = LLM(model="m")
    executor = engine_of(llm).executor
    ended: list[object] = []
    closed_in_step: list[bool] = []
    closing = threading.Thread(target=llm.close)

    def close_in_step() -> None:
        if executor.num_results == 5:
            closing.start()
            closing.join(0.1)
            closed_in_step.append(executor.closed)

    executor.on_step = close_in_step

    def call() -> None:
        try:
            ended.append(
                len(
                    llm.generate("a", SamplingParams(temperature=0, max_tokens=num_tokens))[0]
                    .outputs[0]
                    .token_ids
                )
            )
        except ConfigError as error:
            ended.append(str(error))

    calling = threading.Thread(target=call)
    calling.start()
    calling.join(60)
    closing.join(60)
    assert closed_in_step == [False]
    assert executor.closed
    assert ended == [5 if num_tokens == 5 else "this LLM is closed; make another one"]


def test_a_signal_handler_may_close_in_the_middle_of_a_step() -> None:
    with LLM(model="m") as llm:
        executor = engine_of(llm).executor
        executor.on_step = llm.close
        with pytest.raises(ConfigError, match="this LLM is closed"):
            llm.generate("a", LONG)
    assert executor.closed


def test_a_stream_keeps_its_llm() -> None:
    stream = LLM(model="m").generate(["a", "b"], [SHORT, LONG], stream=True)
    gc.collect()
    assert [texts(output)[0][:3] for output in stream] == ["ABC", "ABC"]
    del stream
    gc.collect()
    assert FakeEngine.started[0].executor.closed


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own answer to SIGINT, which a shell takes away from what it runs in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_ends_a_stream_after_its_step_and_reaches_the_loops_body_at_once() -> None:
    with LLM(model="m") as llm:
        executor = engine_of(llm).executor
        executor.on_step = lambda: signal.raise_signal(signal.SIGINT) if executor.num_results == 2 else None
        stream = llm.generate(["a", "b"], LONG, stream=True)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        assert executor.num_results == 2
        for output in llm.generate(["c"], SHORT, stream=True):
            assert texts(output) == ["ABC"]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert_idle(llm)

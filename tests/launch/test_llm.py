"""The Python API over a fake engine: shapes, order, errors, aborts."""

import gc
import math
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvshard.launch.llm import LLM
from kvshard.launch.outputs import Logprob
from kvshard.runtime.coordinator.plan import StepResult
from kvshard.runtime.errors import ConfigError, RequestError, ShardError
from kvshard.runtime.sampling_params import SamplingParams

from ..runtime.batch.fakes import NUM_BLOCKS, FakeEngine
from .fake_llm import engine_of

GREEDY = SamplingParams(temperature=0, max_tokens=3)


pytestmark = pytest.mark.usefixtures("fake_engine")


def test_outputs_have_the_known_shape() -> None:
    with LLM(model="m") as llm:
        [output] = llm.generate("hi", SamplingParams(temperature=0, max_tokens=9, stop=["C"], logprobs=1))
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("0", "hi", [104, 105])
    assert output.finished
    assert output.error is None
    [answer] = output.outputs
    assert (answer.index, answer.text, answer.token_ids) == (0, "AB", [65, 66, 67])
    assert (answer.finish_reason, answer.stop_reason) == ("stop", "C")
    likelier = Logprob(-1.5, 1, "x")
    assert answer.logprobs == [
        {65 + index: Logprob(-1.0 - index, 7, "ABC"[index]), ord("x"): likelier} for index in range(3)
    ]
    assert answer.cumulative_logprob == -6.0
    assert output.metrics.ttft_ms is not None
    assert output.metrics.finished_s is not None


def test_log_probabilities_of_the_prompt() -> None:
    with LLM(model="m") as llm:
        [plain] = llm.generate("hi", GREEDY)
        [output] = llm.generate("hi", SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert plain.prompt_logprobs is None
    assert output.prompt_logprobs == [None, {ord("i"): Logprob(-0.5, 7, "i")}]


def test_scores() -> None:
    with LLM(model="m") as llm:
        whole, ids = llm.score(["hey", {"prompt_token_ids": [1, 2]}], prompt_logprobs=2)
        plain = llm.score("hey")[0]
        assert engine_of(llm).coordinator.stats.num_output_tokens == 0
        with pytest.raises(RequestError, match=r"prompts\[1\]: .*the text is one token"):
            llm.score(["hey", "x"])
    assert (whole.request_id, whole.prompt, whole.prompt_token_ids) == ("0", "hey", [104, 101, 121])
    assert (whole.logprob_sum, whole.perplexity, whole.error) == (-1.0, math.exp(0.5), None)
    likelier = {ord("x"): Logprob(-1.5, 1, "x"), ord("y"): Logprob(-2.5, 2, "y")}
    assert whole.prompt_logprobs[:2] == [None, {ord("e"): Logprob(-0.5, 7, "e")} | likelier]
    assert (ids.prompt, ids.logprob_sum) == (None, -0.5)
    assert plain.prompt_logprobs == [None, *({ord(c): Logprob(-0.5, 7, c)} for c in "ey")]


def test_results_come_in_the_order_of_the_prompts() -> None:
    params = [SamplingParams(temperature=0, max_tokens=count) for count in (5, 1, 3)]
    with LLM(model="m", scheduler={"max_num_seqs": 2}) as llm:
        outputs = llm.generate(["a", {"prompt": "b"}, {"prompt_token_ids": [99]}], params)
        again = llm.generate(["a"], params[0])
    assert [output.outputs[0].text for output in outputs] == ["ABCDE", "A", "ABC"]
    assert [output.prompt_token_ids for output in outputs] == [[97], [98], [99]]
    assert [output.prompt for output in outputs] == ["a", "b", None]
    assert [output.request_id for output in (*outputs, *again)] == ["0", "1", "2", "3"]
    assert outputs[0].outputs[0].logprobs is outputs[0].outputs[0].cumulative_logprob is None


def test_chats() -> None:
    chat = [{"role": "user", "content": "four"}]
    with LLM(model="m") as llm:
        [one] = llm.chat(chat, GREEDY)
        two = llm.chat([chat, [*chat, {"role": "user", "content": "12345"}]], GREEDY)
        assert llm.chat([], GREEDY) == llm.generate([]) == []
    assert one.prompt_token_ids == [4]
    assert one.prompt is None
    assert [output.prompt_token_ids for output in two] == [[4], [4, 5]]


def test_the_defaults_come_from_the_settings() -> None:
    with LLM(model="m", sampling={"max_tokens": 2, "temperature": 0}, cache={"num_blocks": 64}) as llm:
        assert llm.generate("a")[0].outputs[0].text == "AB"
        assert engine_of(llm).config.cache.num_blocks == 64
        assert engine_of(llm).config.launcher == "local"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_paralel_size": 2}, "unknown key tensor_paralel_size; did you mean tensor_parallel_size?"),
        ({"cache": {"num_block": 2}}, r"did you mean cache\.num_blocks\?"),
        ({"num_blocks": 2}, r"did you mean cache\.num_blocks\?"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"input": {"path": "x"}}, "input belongs to a job file"),
        ({"launcher": "torchrun"}, "launcher=torchrun only runs job files"),
        ({"task": "score"}, r"task belongs to a job file; call generate\(\), chat\(\) or score\(\)"),
    ],
)
def test_bad_settings_start_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(model="m", **settings)
    assert not FakeEngine.started


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("x" * 500, r"prompts\[1\]: .*500"),
        ("\0", r"prompts\[1\]: this prompt cannot be tokenised"),
        ({"prompt_token_id": [1]}, "a prompt is text"),
        (5, "a prompt is text"),
    ],
)
def test_a_bad_prompt_raises_before_any_runs(prompt: Any, message: str) -> None:
    with LLM(model="m") as llm:
        with pytest.raises(RequestError, match=message):
            llm.generate(["good", prompt], GREEDY)
        assert engine_of(llm).executor.num_results == 0
        assert not engine_of(llm).coordinator.has_work
        assert llm.generate("good", GREEDY)[0].outputs[0].text == "ABC"


def test_as_many_params_as_prompts() -> None:
    with LLM(model="m") as llm, pytest.raises(RequestError, match="2 prompts and 1 sampling_params"):
        llm.generate(["a", "b"], [GREEDY])


def test_abort_frees_the_blocks_and_the_others_go_on() -> None:
    long = SamplingParams(temperature=0, max_tokens=100)
    with LLM(model="m", scheduler={"max_num_seqs": 2}) as llm:
        engine = engine_of(llm)

        def abort_one_running_and_one_waiting() -> None:
            if engine.executor.num_results == 4:
                # As a user would, from another thread.
                for request_id in ("0", "2", "no such id"):
                    thread = threading.Thread(target=llm.abort, args=(request_id,))
                    thread.start()
                    thread.join(10)

        engine.executor.on_step = abort_one_running_and_one_waiting
        outputs = llm.generate(["a", "b", "c", "d"], [long, GREEDY, long, GREEDY])
        assert not engine.coordinator.has_work
        engine.coordinator.check_integrity()
        assert engine.coordinator._scheduler.blocks.num_free == NUM_BLOCKS - 1
        llm.abort("0")  # long gone
        assert llm.generate("e", GREEDY)[0].outputs[0].finish_reason == "length"
    assert [output.outputs[0].finish_reason for output in outputs] == ["abort", "length", "abort", "length"]
    assert outputs[0].outputs[0].text == "ABCD"[: len(outputs[0].outputs[0].token_ids)]
    assert outputs[2].outputs[0].token_ids == []


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own answer to SIGINT, which a shell takes away from what it runs in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("num_interrupts", [1, 2])
def test_an_interrupt_waits_for_the_step_and_a_second_does_not(num_interrupts: int) -> None:
    """It comes while a result is on its way: what ends the step there loses that result."""
    with LLM(model="m") as llm:
        executor = engine_of(llm).executor
        result = executor.result

        def interrupted_result() -> StepResult:
            answer = result()
            if executor.num_results == 2:
                for _ in range(num_interrupts):
                    signal.raise_signal(signal.SIGINT)
            return answer

        executor.result = interrupted_result  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], SamplingParams(temperature=0, max_tokens=100))
        assert executor.num_results == 2
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if num_interrupts == 1:
            [output] = llm.generate(["c"], GREEDY)
            assert (output.request_id, output.outputs[0].text) == ("2", "ABC")
        else:
            with pytest.raises(ConfigError, match="this LLM is closed"):
                llm.generate(["c"], GREEDY)


def test_a_lost_shard_is_raised_and_a_closed_llm_says_so() -> None:
    llm = LLM(model="m")
    engine_of(llm).executor.lost_at_step = 2
    with pytest.raises(ShardError, match="node-b"):
        llm.generate(["a", "b"], GREEDY)
    assert engine_of(llm).executor.closed
    llm.close()
    llm.close()
    with pytest.raises(ConfigError, match="this LLM is closed"):
        llm.generate("a", GREEDY)


def test_a_dropped_llm_stops_its_shards() -> None:
    llm = LLM(model="m")
    engine = engine_of(llm)
    del llm
    gc.collect()
    assert engine.executor.closed


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with LLM(model="m") as llm:
        llm.generate(["a", "b"], GREEDY)
        assert capsys.readouterr() == ("", "")
        llm.generate(["a", "b"], GREEDY, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/2 rows" in err

"""`generate` with n above 1, over a fake engine."""

import pytest

from kvshard.launch.llm import LLM
from kvshard.runtime.sampling_params import SamplingParams

from .fake_llm import SHORT, assert_idle, engine_of, texts

pytestmark = pytest.mark.usefixtures("fake_engine")


def test_n_answers_to_one_prompt() -> None:
    params = SamplingParams(n=3, max_tokens=9, stop="D", logprobs=0)
    with LLM(model="m", scheduler={"max_num_seqs": 2}) as llm:
        first, second = llm.generate(["a", "b"], [params, SHORT])
        assert_idle(llm)
    assert texts(first) == ["ABC", "BC", "C"]
    assert [answer.index for answer in first.outputs] == [0, 1, 2]
    assert first.outputs[2].token_ids == [67, 68]
    assert (first.request_id, first.prompt_token_ids, first.error) == ("0", [97], None)
    assert (second.request_id, texts(second)) == ("1", ["ABC"])
    metrics = first.metrics
    assert metrics.admitted_s is not None
    assert metrics.first_token_s is not None
    assert metrics.ttft_ms == (metrics.first_token_s - metrics.admitted_s) * 1e3
    assert metrics.finished_s is not None
    assert metrics.tpot_ms is not None


def test_a_sample_without_an_answer_is_told_from_the_others() -> None:
    with LLM(model="m") as llm:
        engine_of(llm).executor.fails = lambda sample_index: sample_index == 1
        [output] = llm.generate("a", SamplingParams(n=3, max_tokens=3))
    assert output.error is not None
    assert output.error.startswith("1 of 3 samples failed, the first at index 1: the model's logits")
    assert [answer.finish_reason for answer in output.outputs] == ["length", "error", "length"]
    assert texts(output) == ["ABC", "", "CDE"]


def test_abort_ends_all_samples() -> None:
    with LLM(model="m", scheduler={"max_num_seqs": 2}) as llm:
        executor = engine_of(llm).executor
        executor.on_step = lambda: llm.abort("0") if executor.num_results == 4 else None
        aborted, other = llm.generate(["a", "b"], [SamplingParams(n=3, max_tokens=100), SHORT])
        assert_idle(llm)
    assert [answer.finish_reason for answer in aborted.outputs] == ["abort"] * 3
    assert texts(aborted)[2] == ""  # it never had a slot
    assert texts(other) == ["ABC"]

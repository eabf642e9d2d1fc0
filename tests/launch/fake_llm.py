"""What tests of `LLM` over a fake engine look at."""

from kvshard.launch.llm import LLM, RequestOutput
from kvshard.runtime.sampling_params import SamplingParams

from ..runtime.batch.fakes import NUM_BLOCKS, FakeEngine

SHORT = SamplingParams(temperature=0, max_tokens=3)
LONG = SamplingParams(temperature=0, max_tokens=100)


def engine_of(llm: LLM) -> FakeEngine:
    assert len(FakeEngine.started) == 1
    return FakeEngine.started[0]


def assert_idle(llm: LLM) -> None:
    coordinator = engine_of(llm).coordinator
    assert not coordinator.has_work
    coordinator.check_integrity()
    assert coordinator._scheduler.blocks.num_free == NUM_BLOCKS - 1


def texts(output: RequestOutput) -> list[str]:
    return [answer.text for answer in output.outputs]

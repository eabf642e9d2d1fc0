"""An engine without a model: the real coordinator over an executor that says A, B, C, ...

Run as a program it is the `kvshard` command with this engine in the real one's place:
python fakes.py QUICK_STEPS run JOB.yaml
After QUICK_STEPS steps it is slow, so that a test can count on the job's still being there.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, Self

import numpy as np

from kvshard.runtime.config import JobConfig, Task
from kvshard.runtime.coordinator.executor import ShardHealth, ShardInfo
from kvshard.runtime.coordinator.limits import Limits
from kvshard.runtime.coordinator.logprobs import LogprobTable
from kvshard.runtime.coordinator.loop import Coordinator
from kvshard.runtime.coordinator.plan import NO_TOKEN, Int32, StepPlan, StepResult
from kvshard.runtime.coordinator.request import Request
from kvshard.runtime.errors import RequestError, ShardError
from kvshard.runtime.models.prompt import Prompt
from kvshard.runtime.models.spec import LayerGroup
from kvshard.runtime.sampling_params import SamplingParams

NUM_BLOCKS = 1000
SLOW_STEP_S = 0.2


class FakeTokenizer:
    """A token is a character."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(token_id) for token_id in token_ids)


class FakeExecutor:
    """The n-th token that a slot samples is the n-th letter from A, or from B for sample 1; its log probability is -n, and x
    and y are likelier."""

    def __init__(self, num_quick: int | None = None) -> None:
        self.num_quick = num_quick  # steps until they take SLOW_STEP_S; None: never
        self.lost_at_step: int | None = None
        self.on_step: Callable[[], None] = lambda: None
        self.num_results = 0
        self.closed = False
        self._plans: deque[StepPlan] = deque()
        self._sampled: dict[int, int] = {}
        self._first: dict[int, int] = {}
        self.fails: Callable[[int], bool] = lambda sample_index: False

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def result(self) -> StepResult:
        if self.num_quick is not None and self.num_results >= self.num_quick:
            time.sleep(SLOW_STEP_S)
        self.num_results += 1
        if self.num_results == self.lost_at_step:
            raise ShardError(1, "node-b", self.num_results, "killed by signal 9")
        self.on_step()
        plan = self._plans.popleft()
        for opened in plan.opened:
            self._sampled[opened.slot] = 0
            self._first[opened.slot] = opened.sampling.sample_index
        token_ids = np.full(plan.num_rows, NO_TOKEN, np.int32)
        logprobs: list[float] = []
        for row, slot in enumerate(plan.row_slots.tolist()):
            if plan.row_samples[row]:
                if not self.fails(self._first[slot]):
                    token_ids[row] = ord("A") + (self._first[slot] + self._sampled[slot]) % 26
                self._sampled[slot] += 1
                logprobs.append(-self._sampled[slot])
        of_prompts = None
        if plan.targets is not None:
            of_prompts = _table(plan.targets.token_ids, [-0.5] * len(plan.targets.token_ids))
        table = _table(token_ids[plan.row_samples], logprobs)
        return StepResult(plan.epoch, plan.step_id, token_ids, table, of_prompts)

    def health(self) -> list[ShardHealth]:
        return [ShardHealth(0, self.num_results, 3 * 2**30)]

    def close(self) -> None:
        self.closed = True


def _table(token_ids: Int32, logprobs: list[float]) -> LogprobTable:
    """Tokens of rank 7; x and y are the most likely ones."""
    count = len(token_ids)
    return LogprobTable(
        np.column_stack((token_ids, np.full((count, 2), (ord("x"), ord("y"))))).astype(np.int32),
        np.column_stack((np.array(logprobs), np.full((count, 2), (-1.5, -2.5)))).astype(np.float32),
        np.full((count, 3), (7, 1, 2), np.int32),
    )


class FakeEngine:
    """What the batch job and the Python API need of an engine."""

    started: ClassVar[list[FakeEngine]] = []
    num_quick: ClassVar[int | None] = None
    prepare: ClassVar[Callable[[FakeEngine], None]] = staticmethod(lambda engine: None)

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.tokenizer = FakeTokenizer()
        self.executor = FakeExecutor(self.num_quick)
        self.shards = [
            ShardInfo(0, "node-a", 1, "cpu", 6, 2, 2**27, NUM_BLOCKS * 2**20, NUM_BLOCKS, "shared_memory", 1),
            ShardInfo(1, "node-b", 2, "cpu", 3, 1, 2**26, NUM_BLOCKS * 2**19, NUM_BLOCKS, "shared_memory", 1),
        ]
        max_model_len = config.scheduler.max_model_len or 128
        self.coordinator = Coordinator(
            self.executor,  # type: ignore[arg-type]
            Limits.from_config(
                config,
                num_blocks=NUM_BLOCKS,
                max_model_len=max_model_len,
                layer_groups=(LayerGroup(None, 1),),
            ),
            tokenizer=self.tokenizer,
        )

    @classmethod
    def start(
        cls, config: JobConfig, *, launcher: Any = None, on_status: Callable[[str], None] = lambda text: None
    ) -> Self:
        on_status("starting")
        resolved = config.model_copy(update={"dtype": "float32", "device": "cpu"})
        engine = cls(resolved)
        cls.started.append(engine)
        cls.prepare(engine)
        return engine

    def make_request(
        self, request_id: str, prompt: Prompt, sampling: SamplingParams, task: Task = "generate"
    ) -> Request:
        if isinstance(prompt, str):
            token_ids = [ord(character) for character in prompt]
        else:
            token_ids = [item if isinstance(item, int) else len(item["content"]) for item in prompt]
        if "\0" in str(prompt):
            raise RequestError("this prompt cannot be tokenised")
        return Request.new(request_id, token_ids, sampling, self.config.seed, task=task)

    def close(self) -> None:
        self.executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fake_engine_module() -> ModuleType:
    """To be put in sys.modules as kvshard.launch.engine."""
    module = ModuleType("kvshard.launch.engine")
    module.Engine = FakeEngine  # type: ignore[attr-defined]
    FakeEngine.started = []
    FakeEngine.num_quick = None
    FakeEngine.prepare = staticmethod(lambda engine: None)
    return module


if __name__ == "__main__":
    sys.modules["kvshard.launch.engine"] = fake_engine_module()
    FakeEngine.num_quick = int(sys.argv.pop(1))
    from kvshard.launch.cli import main

    main()

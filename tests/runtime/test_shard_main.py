"""The shard's main loop without sockets or a model: when plans are launched, and what a failure is reported as."""

from collections import deque
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch

from kvshard.parallel.group import Group, GroupError
from kvshard.runtime.config import parse_config
from kvshard.runtime.coordinator.plan import StepPlan, decode_result, encode_plan
from kvshard.runtime.errors import ConfigError
from kvshard.runtime.messages import Kind, ShardJob, unpack
from kvshard.runtime.models.fields import CheckpointError
from kvshard.runtime.shard import main
from kvshard.runtime.shard.worker import PendingResult

CPU = torch.device("cpu")
JOB = ShardJob(
    job_id="job",
    epoch=0,
    rank=0,
    world_size=1,
    endpoint="",
    curve=None,
    config_json=parse_config({"model": "m", "device": "cpu", "dtype": "float32"}, "test").model_dump_json(),
    model_path="",
    device="cpu",
    store_host="",
)


def plan(step_id: int) -> StepPlan:
    none, one, no = np.zeros(0, np.int32), np.ones(1, np.int32), np.zeros(1, np.bool_)
    return StepPlan(0, step_id, none, (), none, none, none, (), one, one, no, no, one)


class FakeLink:
    """Plan 0 is there; plan 1 comes while the shard waits for step 0; CLOSE once both are answered."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.messages = deque([plan(0)])
        self.num_looks = 0

    def has_message(self) -> bool:
        self.num_looks += 1
        if self.num_looks == 3:
            self.messages.append(plan(1))
        return bool(self.messages)

    def receive(self) -> tuple[Kind, bytes]:
        if self.messages:
            return Kind.PLAN, encode_plan(self.messages.popleft())
        return Kind.CLOSE, b""

    def send(self, kind: Kind, payload: bytes) -> None:
        assert kind is Kind.RESULT
        self.events.append(f"answered {decode_result(payload).step_id}")

    def note_step(self, step_id: int) -> None:
        pass


class FakeDevice:
    """Is done with a step once the next one was launched, or nothing more will come."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def run(self, plan: StepPlan) -> PendingResult:
        self.events.append(f"launched {plan.step_id}")
        pending = PendingResult(plan, CPU, 5.0)
        pending.finish()
        pending._done = self  # type: ignore[assignment]
        return pending

    def query(self) -> bool:
        return "launched 1" in self.events


def test_a_plan_that_comes_while_the_device_works_is_launched_at_once() -> None:
    events: list[str] = []
    with ExitStack() as held:
        link: Any = FakeLink(events)
        worker: Any = FakeDevice(events)
        main._Shard(JOB, link, held)._run_plans(worker)
    assert events == ["launched 0", "launched 1", "answered 0", "answered 1"]


def test_a_step_that_hangs_ends_at_its_deadline() -> None:
    pending = FakeDevice([]).run(plan(7))
    pending._deadline_s = 0.01
    with pytest.raises(TimeoutError, match=r"step 7 did not finish .* timeouts.step_s=0.01 s"):
        pending.wait()


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ConfigError("set x"), "config"),
        (CheckpointError("cut short"), "config"),
        (FileNotFoundError(2, "No such file", "model"), "config"),
        (GroupError("gone", rank=0, where="layer 3 o_proj", sequence=1, missing=[1]), "group"),
        (TimeoutError("step 7 did not finish"), "shard"),
        (ValueError("a bug: could not broadcast"), "shard"),
    ],
)
def test_a_failure_is_reported_before_anything_is_given_back(
    monkeypatch: pytest.MonkeyPatch, error: Exception, cause: str
) -> None:
    events: list[str] = []

    class ReportingLink:
        def __init__(self, job: ShardJob) -> None:
            pass

        def send(self, kind: Kind, payload: bytes) -> None:
            assert kind is Kind.ERROR
            events.append(unpack(payload)["cause"])

        def close(self) -> None:
            events.append("link closed")

    class ClosedGroup(Group):
        def close(self) -> None:
            events.append("group closed")

    def serve(shard: main._Shard) -> None:
        shard._held.callback(ClosedGroup(0, 1, CPU, None).close)
        raise error

    monkeypatch.setattr(main, "Link", ReportingLink)
    monkeypatch.setattr(main._Shard, "serve", serve)
    with pytest.raises(SystemExit):
        main.run_shard(JOB)
    assert events == [cause, "group closed", "link closed"]

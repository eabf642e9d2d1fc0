"""What surrounds the layers of a step never makes the host wait for the device.

Run on torch's "meta" device, whose tensors hold nothing: code that looks at a value, and so would wait for it,
fails. What is left is copies to the device, which wait unless they come from pinned memory.
"""

import numpy as np
import pytest
import torch

from kvshard.kernels import sampling_ops
from kvshard.kernels.cpu import sampling_torch
from kvshard.kernels.metadata import AttentionMetadata
from kvshard.parallel.group import Group
from kvshard.runtime.coordinator.logits_rules import LogitsRules
from kvshard.runtime.coordinator.plan import OpenedSlot, SlotSampling, StepPlan
from kvshard.runtime.shard.logits_processors import LogitsProcessors
from kvshard.runtime.shard.sampler import Sampler
from kvshard.runtime.shard.slots import Slots

META = torch.device("meta")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each copy to the device: did it come from pinned memory, in one piece?"""
    pinned: list[torch.Tensor] = []
    seen: list[bool] = []
    plain = torch.Tensor.to

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    def to(tensor: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        out: torch.Tensor = plain(tensor, *args, **options)
        if out.device != tensor.device:
            is_pinned = any(tensor is other for other in pinned)
            seen.append(is_pinned and tensor.is_contiguous() and options.get("non_blocking") is True)
        return out

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    return seen


def sampling(**changes: float | LogitsRules) -> SlotSampling:
    values = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1, "stop_from": 0}
    return SlotSampling(**(values | {"logprobs": 0, "stop_ids": (3,)} | changes))  # type: ignore[arg-type]


def test_laying_out_a_step(copies: list[bool]) -> None:
    slots = Slots(
        num_groups=2, max_num_seqs=4, max_num_batched_tokens=8, max_model_len=64, block_size=4, device=META
    )
    plan = StepPlan(
        epoch=0,
        step_id=0,
        closed_slots=np.array([], np.int32),
        opened=(OpenedSlot(0, 0, ((3, 4), ()), sampling()), OpenedSlot(2, 0, ((7,), (5,)), sampling())),
        appended_slots=np.array([0, 0], np.int32),
        appended_groups=np.array([1, 1], np.int32),
        appended_blocks=np.array([1, 2], np.int32),
        copied=(),
        row_slots=np.array([0, 2], np.int32),
        row_num_new_tokens=np.array([5, 1], np.int32),
        row_from_device=np.array([False, True]),
        row_samples=np.ones(2, np.bool_),
        token_ids=np.arange(5, dtype=np.int32),
    )
    inputs = slots.apply(plan)
    slots.store_sampled(inputs.sample_slots, torch.zeros(2, dtype=torch.int64, device=META))
    assert len(copies) > 5
    assert all(copies)


def test_sampling(copies: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_ops, "_backend", lambda device_type: sampling_torch)
    sampler = Sampler(Group.single(META), range(100), 100, 4, META)
    sampler.open(0, sampling(stop_from=9))
    sampler.open(1, sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, logprobs=7))
    sampler.open(2, sampling(temperature=1.0, top_p=0.5))
    logits = torch.empty(3, 100, device=META)
    with pytest.raises(RuntimeError):
        logits.sum().item()  # the meta device tells
    token_ids, logprobs = sampler.sample(logits, np.arange(3, dtype=np.int32), np.array([4, 4, 4]))
    assert token_ids.shape == (3,)
    assert logprobs is not None
    assert logprobs.token_ids.shape == (3, 8)
    assert len(copies) == 3
    assert all(copies)


def test_changing_logits_and_counting_tokens(copies: list[bool]) -> None:
    rules = LogitsRules(
        presence_penalty=1.0,
        repetition_penalty=1.2,
        logit_bias=((5, 1.0), (6, 2.0)),
        allowed_token_ids=tuple(range(50)),
        bad_words=((1,), (2, 3), (2, 4, 3)),
        prompt_ids=(3, 4),
        output_ids=(2, 2, 2),
    )
    processors = LogitsProcessors(range(100), 4, META)
    for slot, opened in enumerate((sampling(rules=rules, stop_from=9), sampling(), sampling(rules=rules))):
        processors.open(slot, opened)
    num_on_open = len(copies)
    slots = np.arange(3, dtype=np.int32)
    changed = processors.apply(torch.empty(3, 100, device=META), slots, np.array([4, 4, 4]))
    processors.add_chosen(slots, torch.zeros(3, dtype=torch.int64, device=META))
    assert changed.shape == (3, 100)
    assert 0 < num_on_open < len(copies)
    assert all(copies)


def test_attention_work(copies: list[bool]) -> None:
    pytest.importorskip("triton")
    from kvshard.kernels.tiles import attention_tiles
    from kvshard.kernels.triton.plan import plan_work

    tables = torch.zeros(2, 8, dtype=torch.int32, device=META)
    meta = AttentionMetadata.build(
        np.array([1, 40], np.int32), np.array([100, 90], np.int32), tables, 16, META
    )
    assert len(plan_work(meta, attention_tiles(64, "auto", 2), group=4, window=None)) == 2
    assert len(copies) == 6
    assert all(copies)

"""Recorded calls: played again on new contents, refused when torch had a part in the step, memory that stays in use."""

import ctypes
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvshard.kernels import ops
from kvshard.kernels.cpu import tape
from kvshard.kernels.linear_ops import LinearWeight, embedding, linear

DTYPES = [torch.float32, torch.bfloat16]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


FIRST = torch.tensor([0])
MOST = 5  # tokens, in up to 2 rows


class Step:
    """A few operations in a row, on inputs that stay in their place."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.table = LinearWeight.take(numbers(50, 32, dtype=dtype, seed=1))
        self.weight = LinearWeight.take(numbers(64, 32, dtype=dtype, seed=2))
        self.norm = numbers(32, dtype=dtype, seed=3)
        self.ids = torch.zeros(MOST, dtype=torch.int64)

    def run(self, num_tokens: int = MOST) -> Tensor:
        residual = embedding(self.ids[:num_tokens], self.table)
        hidden = ops.rms_norm(residual, self.norm, 1e-5)
        hidden = ops.silu_mul(linear(hidden, self.weight))
        return ops.add_rms_norm(hidden, residual, self.norm, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_play_follows_its_inputs_and_their_number(dtype: torch.dtype) -> None:
    step, recorded = Step(dtype), tape.Tape(MOST, 2)
    with recorded.recording():
        out = step.run()
    for ids in ([3, 1, 4], [49, 0, 7, 1, 2], [5], [3, 1, 4]):
        step.ids[: len(ids)] = torch.tensor(ids)
        out.fill_(-1)
        recorded.play(len(ids), 1)
        assert torch.equal(out[: len(ids)], step.run(len(ids)))
        assert bool((out[len(ids) :] == -1).all()), "a token that is none was computed"


def test_more_than_was_noted_is_refused() -> None:
    step, recorded = Step(torch.float32), tape.Tape(MOST, 2)
    with recorded.recording():
        step.run()
    for num_tokens, num_rows in ((MOST + 1, 1), (MOST, 3), (0, 1), (1, 0)):
        with pytest.raises(AssertionError, match=r"(tokens|rows), noted for"):
            recorded.play(num_tokens, num_rows)


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("add", lambda x: x + 1),
        ("mul_", lambda x: x.mul_(2)),
        ("clone", lambda x: x.clone()),
        ("empty", lambda x: torch.empty(4)),
        ("empty", lambda x: torch.empty((4, 2))),
        ("__getitem__", lambda x: x[FIRST]),
        ("copy_", lambda x: x.copy_(x)),
        ("__setitem__", lambda x: x.__setitem__(0, 1.0)),
        ("contiguous", lambda x: x.T.contiguous()),
        ("to", lambda x: x.to(torch.float64)),
        ("cat", lambda x: torch.cat((x, x))),
        ("linear", lambda x: torch.nn.functional.linear(x, x)),
    ],
)
def test_what_torch_would_compute_ends_the_recording(name: str, operation: object) -> None:
    recorded, x = tape.Tape(4, 1), numbers(4, 4)
    before = x.clone()
    with (
        pytest.raises(tape.NotPlayableError, match=f"torch computes {name}$"),
        torch.inference_mode(),
        recorded.recording(),
    ):
        operation(x)  # type: ignore[operator]
    assert torch.equal(x, before)
    with pytest.raises(AssertionError, match="nothing was recorded"):
        recorded.play(1, 1)


def test_a_call_on_other_than_the_tokens_of_the_step_ends_the_recording() -> None:
    x, weight = numbers(8, 32), numbers(32)
    with (
        pytest.raises(tape.NotPlayableError, match="num_tokens is 8 in a step of 4"),
        tape.Tape(4, 1).recording(),
    ):
        ops.rms_norm(x, weight, 1e-5)


def test_views_are_no_computation() -> None:
    x, recorded = numbers(4, 6), tape.Tape(4, 1)
    with torch.inference_mode(), recorded.recording():
        a, b = x.view(4, 2, 3).split([1, 1], dim=1)
        assert a[1:].unsqueeze(0).shape == (1, 3, 1, 3)
        assert b[0].shape == (1, 3)
        assert torch.empty((0, 3)).shape == (0, 3)


class Arguments(ctypes.Structure):
    _fields_ = (("num_tokens", ctypes.c_int64), ("status", ctypes.c_int), ("calls", ctypes.c_int))


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Arguments))
def counted(arguments: "ctypes._Pointer[Arguments]") -> int:
    arguments.contents.calls += 1
    return int(arguments.contents.status)


def test_the_caller_of_a_failed_call_says_what_failed() -> None:
    recorded = tape.Tape(4, 1)
    structs = [Arguments(4, 0, 0) for _ in range(3)]
    with recorded.recording():
        for index, struct in enumerate(structs):
            tape.call(counted, struct, lambda status, index=index: OSError(f"call {index}: status {status}"))
    assert [struct.calls for struct in structs] == [0, 0, 0], "noted, not made"
    recorded.play(3, 1)
    structs[1].status = 7
    with pytest.raises(OSError, match="call 1: status 7"):
        recorded.play(2, 1)
    assert [struct.calls for struct in structs] == [2, 2, 1]
    assert [struct.num_tokens for struct in structs] == [2, 2, 3]
    with pytest.raises(OSError, match="alone: status 7"):
        tape.call(counted, structs[1], lambda status: OSError(f"alone: status {status}"))


def test_calls_of_other_threads_are_made_and_not_noted() -> None:
    recorded, struct = tape.Tape(4, 1), Arguments(4, 0, 0)
    with recorded.recording():
        thread = threading.Thread(target=tape.call, args=(counted, struct, tape.no_memory))
        thread.start()
        thread.join()
    recorded.play(4, 1)
    assert struct.calls == 1


class Unnumbered(ctypes.Structure):
    _fields_ = (("status", ctypes.c_int),)


def test_a_call_says_how_much_it_is_about() -> None:
    with pytest.raises(AssertionError, match="Unnumbered does not say"), tape.Tape(4, 1).recording():
        tape.call(counted, Unnumbered(0), tape.no_memory)


def test_memory_is_used_again_once_nothing_lies_on_it() -> None:
    recorded = tape.Tape(4, 1)
    x = recorded.empty((4, 8), torch.float32)
    place = x.data_ptr()
    view = x[1:].view(-1)
    del x
    other = recorded.empty((32,), torch.float32)
    assert other.data_ptr() != place, "a view still lies there"
    del view
    assert recorded.empty((4, 16), torch.bfloat16).data_ptr() == place
    assert place % 64 == other.data_ptr() % 64 == 0
    assert recorded.empty((0, 3), torch.bfloat16).shape == (0, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_memory_of_steps_that_never_come_is_not_taken() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    recorded, before = tape.Tape(1 << 20, 1), resident_bytes()
    x = recorded.empty((1 << 20, 256), torch.float32)  # 1 GiB
    x[:1000] = 1
    assert resident_bytes() - before < 100 << 20


def test_a_tape_is_recorded_once_and_alone() -> None:
    recorded = tape.Tape(MOST, 1)
    with pytest.raises(AssertionError, match="nothing was recorded"):
        recorded.play(1, 1)
    with (
        recorded.recording(),
        pytest.raises(AssertionError, match="another tape"),
        tape.Tape(MOST, 1).recording(),
    ):
        pass
    with pytest.raises(AssertionError, match="recorded once"), recorded.recording():
        pass

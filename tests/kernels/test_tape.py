"""Recorded calls: played again on new contents, refused when torch had a part in the step, memory that stays in use."""

import ctypes
import threading

import pytest
import torch
from torch import Tensor

from kvshard.kernels import ops
from kvshard.kernels.cpu import tape
from kvshard.kernels.linear_ops import LinearWeight, embedding, linear

DTYPES = [torch.float32, torch.bfloat16]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Step:
    """A few operations in a row, on inputs that stay in their place."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.table = LinearWeight.take(numbers(50, 32, dtype=dtype, seed=1))
        self.weight = LinearWeight.take(numbers(64, 32, dtype=dtype, seed=2))
        self.norm = numbers(32, dtype=dtype, seed=3)
        self.ids = torch.tensor([3, 1, 4])

    def run(self) -> Tensor:
        residual = embedding(self.ids, self.table)
        hidden = ops.rms_norm(residual, self.norm, 1e-5)
        hidden = ops.silu_mul(linear(hidden, self.weight))
        return ops.add_rms_norm(hidden, residual, self.norm, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_play_follows_its_inputs(dtype: torch.dtype) -> None:
    step, recorded = Step(dtype), tape.Tape(tape.Arena())
    with recorded.recording():
        out = step.run()
    assert recorded.foreign is None
    first = out.clone()
    assert torch.equal(first, step.run())
    step.ids.copy_(torch.tensor([49, 0, 7]))
    recorded.play()
    assert torch.equal(out, step.run())
    assert not torch.equal(out, first)
    step.ids.copy_(torch.tensor([3, 1, 4]))
    recorded.play()
    assert torch.equal(out, first)


def test_results_outlive_other_tapes_of_the_arena() -> None:
    """What a tape returned is not overwritten by recording another one, while it is held."""
    arena, step = tape.Arena(), Step(torch.float32)
    results = []
    for ids in ([1, 2, 3], [4, 5, 6]):
        step.ids.copy_(torch.tensor(ids))
        recorded = tape.Tape(arena)
        with recorded.recording():
            out = step.run()
        results.append((recorded, out, out.clone()))
    assert torch.equal(results[1][1], results[1][2])
    assert torch.equal(results[0][1], results[0][2])
    results[0][0].play()  # on the second ids
    assert torch.equal(results[0][1], results[1][2])


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("add", lambda x: x + 1),
        ("mul_", lambda x: x.mul_(2)),
        ("clone", lambda x: x.clone()),
        ("empty", lambda x: torch.empty(4)),
        ("__getitem__", lambda x: x[torch.tensor([0])]),
        ("copy_", lambda x: x.copy_(x)),
        ("__setitem__", lambda x: x.__setitem__(0, 1.0)),
        ("contiguous", lambda x: x.T.contiguous()),
        ("to", lambda x: x.to(torch.float64)),
        ("cat", lambda x: torch.cat((x, x))),
        ("linear", lambda x: torch.nn.functional.linear(x, x)),
    ],
)
def test_what_torch_computes_is_noticed(name: str, operation: object) -> None:
    recorded = tape.Tape(tape.Arena())
    with torch.inference_mode(), recorded.recording():
        operation(numbers(4, 4))  # type: ignore[operator]
    assert recorded.foreign == name
    with pytest.raises(AssertionError, match="was not recorded"):
        recorded.play()


def test_a_step_that_is_not_going_to_be_played_leaves_no_memory_behind() -> None:
    arena = tape.Arena()
    with torch.inference_mode(), tape.Tape(arena).recording():
        numbers(4, 4).clone()
        assert tape.empty((64,), torch.float32).shape == (64,)
    assert arena.num_bytes == 0


def test_views_are_no_computation() -> None:
    x, recorded = numbers(4, 6), tape.Tape(tape.Arena())
    with torch.inference_mode(), recorded.recording():
        a, b = x.view(4, 2, 3).split([1, 1], dim=1)
        assert a[1:].unsqueeze(0).shape == (1, 3, 1, 3)
        assert b[0].shape == (1, 3)
    assert recorded.foreign is None


class Arguments(ctypes.Structure):
    _fields_ = (("status", ctypes.c_int), ("calls", ctypes.c_int))


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Arguments))
def counted(arguments: "ctypes._Pointer[Arguments]") -> int:
    arguments.contents.calls += 1
    return int(arguments.contents.status)


def test_the_caller_of_a_failed_call_says_what_failed() -> None:
    recorded = tape.Tape(tape.Arena())
    structs = [Arguments(0, 0) for _ in range(3)]
    with recorded.recording():
        for index, struct in enumerate(structs):
            tape.call(counted, struct, lambda status, index=index: OSError(f"call {index}: status {status}"))
    recorded.play()
    structs[1].status = 7
    with pytest.raises(OSError, match="call 1: status 7"):
        recorded.play()
    assert [struct.calls for struct in structs] == [3, 3, 2]
    with pytest.raises(OSError, match="alone: status 7"):
        tape.call(counted, structs[1], lambda status: OSError(f"alone: status {status}"))


def test_calls_of_other_threads_are_not_noted() -> None:
    recorded, struct = tape.Tape(tape.Arena()), Arguments(0, 0)
    with recorded.recording():
        thread = threading.Thread(target=tape.call, args=(counted, struct, tape.no_memory))
        thread.start()
        thread.join()
    recorded.play()
    assert struct.calls == 1


def test_memory_is_used_again_once_nothing_lies_on_it() -> None:
    arena = tape.Arena()
    x = arena.empty((4, 8), torch.float32)
    place = x.data_ptr()
    view = x[1:].view(-1)
    del x
    other = arena.empty((32,), torch.float32)
    assert other.data_ptr() != place, "a view still lies there"
    del view
    assert arena.empty((2, 16), torch.float32).data_ptr() == place
    assert place % 64 == other.data_ptr() % 64 == 0
    assert arena.empty((0, 3), torch.bfloat16).shape == (0, 3)


def test_many_sizes_share_their_memory() -> None:
    """Steps of 1 to 64 rows, one after the other, need little more than the one of 64."""
    arena, largest = tape.Arena(), 0
    for rows in range(1, 65):
        held = [arena.empty((rows, width), torch.bfloat16) for width in (576, 3072, 1536)]
        largest = sum(tensor.nbytes for tensor in held)
        del held
    assert arena.num_bytes < 5 * largest


def test_a_tape_is_recorded_once_and_alone() -> None:
    recorded = tape.Tape(tape.Arena())
    with pytest.raises(AssertionError, match="nothing was recorded"):
        recorded.play()
    with (
        recorded.recording(),
        pytest.raises(AssertionError, match="another tape"),
        tape.Tape(tape.Arena()).recording(),
    ):
        pass
    with pytest.raises(AssertionError, match="recorded once"), recorded.recording():
        pass

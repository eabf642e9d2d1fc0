"""Steps that are all C calls, noted once and then played again without Python: what a CUDA graph is on a GPU.

Every C function that is called through here takes the address of one struct, and returns 0 or what went wrong. Between two
plays only the contents of tensors may change: their places, shapes and the number of threads are noted. A step in which
torch computes anything is no such step.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .library import load

Failed = Callable[[int], Exception]
"""What to raise for a status other than 0."""

# Of torch's functions, those that ask a tensor something or make a view of it.
_HARMLESS = frozenset(
    (
        *(
            "__get__",
            "__len__",
            "data_ptr",
            "dim",
            "element_size",
            "is_contiguous",
            "numel",
            "size",
            "stride",
        ),
        *("untyped_storage", "frombuffer", "view", "split", "unbind", "unsqueeze", "select", "narrow"),
    )
)
_ALIGNMENT = 64


class _Call(ctypes.Structure):
    """struct call"""

    _fields_ = (("function", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


class Arena:
    """Memory for the results of noted calls. What a step has let go of is used again by its later calls, as in any step,
    but stays here when all of it is: plays need it. Tapes may share an arena if nobody reads what one returned after
    another was played. Sizes are powers of two, so that all of them together need little more than the largest step."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Any]] = defaultdict(list)
        self.num_bytes = 0  # of all pieces, free or not

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            return torch.empty(shape, dtype=dtype)
        size = 1 << (num_bytes - 1).bit_length()
        kept = self._free[size]
        if not kept:
            kept.append((ctypes.c_uint8 * (size + _ALIGNMENT))())
            self.num_bytes += size
        memory = kept.pop()
        start = -ctypes.addressof(memory) % _ALIGNMENT
        # A new object each time: it goes when the last tensor on this memory goes.
        piece = (ctypes.c_uint8 * num_bytes).from_buffer(memory, start)
        weakref.finalize(piece, kept.append, memory).atexit = False
        return torch.frombuffer(piece, dtype=dtype, count=math.prod(shape)).view(shape)


class Tape:
    """The calls of one step."""

    def __init__(self, arena: Arena) -> None:
        self.foreign: str | None = None  # an operation of torch's: the tape cannot be played
        self._arena = arena
        self._noted: list[tuple[int, ctypes.Structure, Failed]] = []
        self._calls: ctypes.Array[_Call] | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Calls of this thread are noted, and made. Not to be nested."""
        assert self._calls is None, "a tape is recorded once"
        assert _current.get() is None, "another tape is being recorded"
        token = _current.set(self)
        try:
            with _Watch(self):
                yield
        finally:
            _current.reset(token)
        self._calls = (_Call * len(self._noted))(
            *(_Call(function, ctypes.addressof(arguments)) for function, arguments, _ in self._noted)
        )

    def play(self) -> None:
        """Make all calls again. Raises what the caller of the failed one said."""
        assert self._calls is not None, "nothing was recorded"
        assert self.foreign is None, f"{self.foreign} was not recorded"
        status = ctypes.c_int(0)
        done = _player().tape_play(self._calls, len(self._noted), ctypes.byref(status))
        if status.value:
            raise self._noted[done][2](status.value)

    def note(self, function: Any, arguments: ctypes.Structure, failed: Failed) -> None:
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None, "a function has an address"
        self._noted.append((address, arguments, failed))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.foreign is not None:
            return torch.empty(shape, dtype=dtype)  # it is not going to be played
        return self._arena.empty(shape, dtype)


_current: ContextVar[Tape | None] = ContextVar("tape", default=None)  # that this thread records


def call(function: Any, arguments: ctypes.Structure, failed: Failed) -> None:
    """Calls a C function with the address of `arguments`, which nobody changes after it. Raises `failed(status)`."""
    tape = _current.get()
    if tape is not None:
        tape.note(function, arguments, failed)
    status = function(ctypes.byref(arguments))
    if status:
        raise failed(status)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for the result of a call."""
    tape = _current.get()
    return torch.empty(shape, dtype=dtype) if tape is None else tape.empty(shape, dtype)


def is_available() -> bool:
    """False without a compiler."""
    return load("tape.c") is not None


def no_memory(status: int) -> Exception:
    """What most calls can fail for."""
    return MemoryError("no memory for the operands of a step")


class _Watch(TorchFunctionMode):
    """Sees every call of torch from Python. (A TorchDispatchMode would see what they come to, and imports for a second.)"""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, out = func.__name__, func(*args, **(kwargs or {}))
        if name == "__getitem__":
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            harmless = all(isinstance(place, int | slice) for place in places)
        else:
            # Memory that torch gives out would be gone when the tape is played.
            harmless = name in _HARMLESS or (name == "empty" and out.numel() == 0)
        if not harmless:
            self._tape.foreign = name
        return out


@cache
def _player() -> ctypes.CDLL:
    library = load("tape.c")
    assert library is not None, "what was recorded was compiled"
    library.tape_play.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    library.tape_play.restype = ctypes.c_int64
    return library

"""Steps that are all C calls, noted once and then played without Python: what a CUDA graph is on a GPU.

Every C function that is called through here takes the address of one struct, and returns 0 or what went wrong. Between two
plays the contents of tensors may change, and with them the number of tokens and rows, up to those that were noted: a struct
says them in its fields `num_tokens` and `num_rows`, and nothing else in it depends on them. Places, widths and the number of
threads are noted. A step in which torch computes anything is no such step.
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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .library import load

Failed = Callable[[int], Exception]
"""What to raise for a status other than 0."""

# Of torch's functions, those that ask something or make a view of a tensor.
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
        *("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"),
    )
)
_ALIGNMENT = 64


class NotPlayableError(Exception):
    """A step is something else than C calls on its tokens: the message says what."""


class _Call(ctypes.Structure):
    """struct call"""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("function", "arguments", "num_tokens", "num_rows"))


class _Arena:
    """Memory for the results of noted calls. What a step has let go of is used again by its later calls, as in any step,
    but stays here when all of it is: plays need it. Pages that no play has written to are not taken from the system."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            return torch.empty(shape, dtype=dtype)
        kept = self._free[num_bytes]
        memory = kept.pop() if kept else np.empty(num_bytes + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        # A new object each time: it goes when the last tensor on this memory goes.
        piece = (ctypes.c_uint8 * num_bytes).from_buffer(memory.data, start)
        weakref.finalize(piece, kept.append, memory).atexit = False
        return torch.frombuffer(piece, dtype=dtype, count=math.prod(shape)).view(shape)


class Tape:
    """The calls of a step of up to so many tokens in so many rows."""

    def __init__(self, num_tokens: int, num_rows: int) -> None:
        self.num_tokens = num_tokens
        self.num_rows = num_rows
        self._arena = _Arena()
        self._noted: list[tuple[int, ctypes.Structure, Failed]] = []
        self._calls: ctypes.Array[_Call] | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Calls of this thread are noted and not made: tensors have places and shapes, and no contents. Not to be nested.

        Raises NotPlayableError, before torch computes anything.
        """
        assert self._calls is None, "a tape is recorded once"
        assert _current.get() is None, "another tape is being recorded"
        token = _current.set(self)
        try:
            with _Watch():
                yield
        finally:
            _current.reset(token)
        self._calls = (_Call * len(self._noted))(
            *(self._call(function, arguments) for function, arguments, _ in self._noted)
        )

    def play(self, num_tokens: int, num_rows: int) -> None:
        """Make all calls, on so many tokens and rows. Raises what the caller of the failed one said."""
        assert self._calls is not None, "nothing was recorded"
        assert 0 < num_tokens <= self.num_tokens, f"{num_tokens} tokens, noted for {self.num_tokens}"
        assert 0 < num_rows <= self.num_rows, f"{num_rows} rows, noted for {self.num_rows}"
        status = ctypes.c_int(0)
        done = _player().tape_play(self._calls, len(self._noted), num_tokens, num_rows, ctypes.byref(status))
        if status.value:
            raise self._noted[done][2](status.value)

    def note(self, function: Any, arguments: ctypes.Structure, failed: Failed) -> None:
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None, "a function has an address"
        for name, most in (("num_tokens", self.num_tokens), ("num_rows", self.num_rows)):
            if getattr(arguments, name, most) != most:
                raise NotPlayableError(f"{name} is {getattr(arguments, name)} in a step of {most}")
        self._noted.append((address, arguments, failed))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._arena.empty(shape, dtype)

    @staticmethod
    def _call(function: int, arguments: ctypes.Structure) -> _Call:
        begin, kind = ctypes.addressof(arguments), type(arguments)
        counts = [
            begin + getattr(kind, name).offset if hasattr(kind, name) else None
            for name in ("num_tokens", "num_rows")
        ]
        assert counts != [None, None], f"{kind.__name__} does not say how many tokens or rows it is about"
        return _Call(function, begin, *counts)


_current: ContextVar[Tape | None] = ContextVar("tape", default=None)  # that this thread records


def call(function: Any, arguments: ctypes.Structure, failed: Failed) -> None:
    """Calls a C function with the address of `arguments`, which nobody else changes after it. Raises `failed(status)`."""
    tape = _current.get()
    if tape is not None:
        tape.note(function, arguments, failed)
        return
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

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name == "__getitem__":
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            harmless = all(isinstance(place, int | slice) for place in places)
        else:
            # Memory that torch gives out would be gone when the tape is played.
            harmless = name in _HARMLESS or (name == "empty" and isinstance(args[0], tuple) and 0 in args[0])
        if not harmless:
            raise NotPlayableError(f"torch computes {name}")
        return func(*args, **(kwargs or {}))


@cache
def _player() -> ctypes.CDLL:
    library = load("tape.c")
    assert library is not None, "what was recorded was compiled"
    library.tape_play.argtypes = [ctypes.c_void_p, *(ctypes.c_int64,) * 3, ctypes.c_void_p]
    library.tape_play.restype = ctypes.c_int64
    return library

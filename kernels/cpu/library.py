"""The compiled C sources of this folder."""

from __future__ import annotations

import ctypes
import warnings
from functools import cache
from pathlib import Path

import torch

from ..native import NotCompiledError, load_library

_FOLDER = Path(__file__).parent

# Numbers that vectors.h gives the element types.
FORMAT_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
    torch.uint8: 5,
}


# Each with how the compiler may fuse a product and a sum.
SOURCES = {
    "attention.c": ("-ffp-contract=fast",),
    "linear.c": ("-ffp-contract=fast",),
    "pointwise.c": ("-ffp-contract=off",),  # as written: rotary in float32 has the bits of transformers' own
    "sampling.c": ("-ffp-contract=off",),  # fused in some columns only, a token's mass depends on its column
    "tape.c": (),
}


@cache
def _pool() -> ctypes.CDLL:
    """The threads of all the others."""
    return load_library(_FOLDER / "pool.c", exports=True)


def load_all() -> None:
    """Compile what is not in the cache, now and not in a step that others wait for."""
    for name in SOURCES:
        load(name)


@cache
def load(name: str, *more_flags: str) -> ctypes.CDLL | None:
    """None, and a notice the first time, where it cannot be compiled or loaded: the torch implementations are taken then."""
    try:
        _pool()
        return load_library(_FOLDER / name, *SOURCES[name], *more_flags)
    except NotCompiledError as error:
        warnings.warn(
            f"{name} could not be compiled, so what it does on CPU runs in torch, many times slower ({error}); GCC 12 or newer is "
            "wanted, and a cache directory that can be written (XDG_CACHE_HOME)",
            stacklevel=2,
        )
        return None

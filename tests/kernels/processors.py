"""The C of the CPU as it is compiled for processors older than this one."""

import ctypes
import platform
import warnings
from collections.abc import Callable

import pytest
import torch

# Flags of the compiler: vectors of 8 numbers without AVX-512, and of 4.
OTHER_PROCESSORS = ("-march=haswell", "-march=x86-64-v2")


def load_for(flag: str, load: Callable[[], ctypes.CDLL | None]) -> ctypes.CDLL:
    """The library; the test is skipped where it cannot be made or run."""
    if platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no AVX2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = load()
    if library is None:
        pytest.skip(f"no compiler that knows {flag}")
    return library

"""The C of the CPU as it is compiled for other processors than this one."""

import ctypes
import platform
import warnings
from collections.abc import Callable

import pytest
import torch

# Flags of the compiler: vectors of 16 numbers without a matrix unit, of 8, and of 4.
OTHER_PROCESSORS = ("-march=skylake-avx512", "-march=haswell", "-march=x86-64-v2")


def load_for(flag: str, load: Callable[[], ctypes.CDLL | None]) -> ctypes.CDLL:
    """The library; the test is skipped where it cannot be made or run."""
    wanted = "AVX-512" if "avx512" in flag else "AVX2"
    has = torch.cpu._is_avx512_supported() if wanted == "AVX-512" else torch.cpu._is_avx2_supported()
    if platform.machine() != "x86_64" or not has:
        pytest.skip(f"this processor has no {wanted}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = load()
    if library is None:
        pytest.skip(f"no compiler that knows {flag}")
    return library

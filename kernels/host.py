"""Memory of the host: what it has planned, on its way to the device, and large pages for what is read often."""

import ctypes
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MADV_HUGEPAGE = 14  # of Linux


def prefer_huge_pages(tensor: Tensor) -> None:
    """Asks for large pages under a new tensor on CPU, before anything is written to it: fewer of them fit more of it into
    the processor's table of pages. Where the system has none (other than Linux, or by its setting) nothing happens."""
    page = 1 << 21
    begin = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if tensor.device.type != "cpu" or sys.platform != "linux" or end <= begin:
        return
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)


def to_device(values: npt.NDArray[Any], device: torch.device | str) -> Tensor:
    """`values` on `device`, with the same shape and dtype; on CPU the same memory, elsewhere without gaps.

    The host does not wait: only a copy out of pinned memory is asynchronous, any other may first wait for all that
    the device still has to do, and then no step is launched ahead of the last one. It is a copy that is pinned, so `values`
    may be written to again as soon as this returns.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return torch.from_numpy(values)
    return torch.from_numpy(np.ascontiguousarray(values)).pin_memory().to(device, non_blocking=True)

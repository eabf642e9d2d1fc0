"""What the host has planned, on its way to the device."""

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(values: npt.NDArray[Any], device: torch.device | str) -> Tensor:
    """`values` on `device`, with the same shape and dtype; on CPU the same memory.

    The host does not wait: only a copy out of pinned memory is asynchronous, any other may first wait for all that
    the device still has to do, and then no step is launched ahead of the last one.
    """
    tensor = torch.from_numpy(values)
    device = torch.device(device)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)

"""Large pages under tensors on CPU."""

import mmap
from pathlib import Path

import pytest
import torch

from kvshard.kernels.host import prefer_huge_pages


def wants_huge_pages(address: int) -> bool:
    """Whether the mapping at an address has the flag that madvise sets."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError("no such mapping")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this system has no large pages to ask for",
)
def test_the_kernel_is_asked_for_whole_pages() -> None:
    memory = mmap.mmap(-1, 3 << 21)  # of its own: what the allocator gives out may have been asked for before
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    page = 1 << 21
    first = -(-tensor.data_ptr() // page) * page
    assert not wants_huge_pages(first)
    prefer_huge_pages(tensor)
    assert wants_huge_pages(first)
    assert wants_huge_pages(first + page)


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_small_tensors_stay_as_they_are(size: int) -> None:
    tensor = torch.arange(size)
    prefer_huge_pages(tensor)
    assert torch.equal(tensor, torch.arange(size))

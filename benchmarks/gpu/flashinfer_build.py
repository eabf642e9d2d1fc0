"""Builds the FlashInfer kernels that the attention parts compare with, beforehand and side by side.

FlashInfer compiles a kernel at its first use, for half a minute or more, and keeps it. This runs while the tests do.
"""

from __future__ import annotations

import multiprocessing

import torch
from attention_peers import flashinfer
from cases import Filled, Shape, import_flashinfer

SHAPES = (
    Shape.decode((64,), 32, 8, 128, 16),
    Shape.decode((64,), 32, 8, 64, 16),
    Shape((64,), (32,), 32, 8, 128, 16),
)


def build(shape: Shape) -> None:
    flashinfer(Filled(shape, torch.device("cuda"), 1))()


if __name__ == "__main__":
    import_flashinfer()
    context = multiprocessing.get_context("spawn")
    builders = [context.Process(target=build, args=(shape,)) for shape in SHAPES]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()

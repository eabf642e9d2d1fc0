"""Loading one shard's weights: each parameter is allocated once and filled piece by piece."""

from concurrent.futures import ThreadPoolExecutor

import torch

from ...kernels.host import prefer_huge_pages
from ...kernels.weight_codes import WeightCodes
from ...parallel.shard_map import Shard
from ..models.checkpoint import Checkpoint
from ..models.parameters import Parameter, local_parameters
from ..models.spec import ModelSpec
from ..models.weight_blocks import codes_in
from ..models.weight_formats import WIDE, WeightFormats

Weights = dict[str, torch.Tensor | WeightCodes]

MAX_THREADS = 8  # of loading: each holds a chunk


def load_weights(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    shard: Shard,
    dtype: torch.dtype,
    device: torch.device,
    formats: WeightFormats = WIDE,
) -> Weights:
    """The shard's parameters by the names of `models/parameters.py`, contiguous; an alias is the same object.

    Peak memory is the parameters themselves plus, for each thread, a chunk on the host and its numbers, 2 MiB or a row.
    """
    parameters = local_parameters(spec, shard, formats)
    weights: Weights = {}
    own: list[Parameter] = []
    for parameter, tensor in zip(parameters, _allocate(parameters, dtype, device), strict=True):
        if parameter.alias_of is None:
            own.append(parameter)
            weights[parameter.name] = tensor
        else:
            weights[parameter.name] = weights[parameter.alias_of]

    def fill(parameter: Parameter) -> None:
        tensor = weights[parameter.name]
        if isinstance(tensor, WeightCodes):
            assert parameter.format is not None, "it decided that there are codes"
            for piece in parameter.pieces:
                end = piece.offset + len(piece.indices)
                place = slice(piece.offset, end) if piece.axis == 0 else slice(None)
                part = tensor.rows(place)
                checkpoint.read_codes(part, parameter.format, piece.tensor, piece.axis, piece.indices)
            return
        # A sum is rounded once, so it is made in float32 (norms of Gemma; small).
        read = torch.empty_like(tensor, dtype=torch.float32) if parameter.added else tensor
        for piece in parameter.pieces:
            target = read.narrow(piece.axis, piece.offset, len(piece.indices))
            checkpoint.read_into(target, piece.tensor, piece.axis, piece.indices)
        if parameter.added:
            tensor.copy_(read + parameter.added)

    # Threads of parameters, and not torch's, which would wait for each other after each small operation.
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, MAX_THREADS), "load", torch.set_num_threads, (1,)) as pool:
            for _ in pool.map(fill, own):
                pass  # raises what the reading of a parameter raised
    finally:
        torch.set_num_threads(threads)  # new threads take what any thread has set last
    return weights


def _allocate(
    parameters: list[Parameter], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor | WeightCodes]:
    """Empty ones. On CPU they lie one behind the other, in large pages: a decode step reads them all, in this order."""
    sizes = [parameter.num_bytes(dtype.itemsize) for parameter in parameters]
    if device.type == "cpu":
        memory = torch.empty(sum(sizes), dtype=torch.uint8)
        prefer_huge_pages(memory)
        parts = memory.split(sizes)
    else:
        parts = tuple(torch.empty(size, dtype=torch.uint8, device=device) for size in sizes)
    return [_laid_out(parameter, part, dtype) for parameter, part in zip(parameters, parts, strict=True)]


def _laid_out(parameter: Parameter, memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | WeightCodes:
    if parameter.alias_of is not None:
        return memory
    if parameter.format is None:
        return memory.view(dtype).view(parameter.shape)
    num_rows, num_columns = parameter.shape
    return codes_in(memory, parameter.format, (num_rows, num_columns), dtype)

"""Loading one shard's weights: each parameter is allocated once and filled piece by piece."""

from concurrent.futures import ThreadPoolExecutor

import torch

from ...kernels.host import prefer_huge_pages
from ...parallel.shard_map import Shard
from ..models.checkpoint import Checkpoint
from ..models.parameters import Parameter, local_parameters
from ..models.spec import ModelSpec

MAX_THREADS = 8  # of loading: each holds a chunk


def load_weights(
    checkpoint: Checkpoint, spec: ModelSpec, shard: Shard, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """The shard's parameters by the names of `models/parameters.py`, contiguous; an alias is the same tensor object.

    Peak memory is the parameters themselves plus a chunk of a few MiB on the host for each thread.
    """
    parameters = local_parameters(spec, shard)
    weights: dict[str, torch.Tensor] = {}
    own: list[Parameter] = []
    for parameter, tensor in zip(parameters, _allocate(parameters, dtype, device), strict=True):
        if parameter.alias_of is None:
            own.append(parameter)
            weights[parameter.name] = tensor
        else:
            weights[parameter.name] = weights[parameter.alias_of]

    def fill(parameter: Parameter) -> None:
        tensor = weights[parameter.name]
        # A sum is rounded once, so it is made in float32 (norms of Gemma; small).
        read = torch.empty_like(tensor, dtype=torch.float32) if parameter.added else tensor
        for piece in parameter.pieces:
            target = read.narrow(piece.axis, piece.offset, len(piece.indices))
            checkpoint.read_into(target, piece.tensor, piece.axis, piece.indices)
        if parameter.added:
            tensor.copy_(read + parameter.added)

    # Threads of parameters, and not torch's, which would wait for each other after each small operation.
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(min(threads, MAX_THREADS), "load", torch.set_num_threads, (1,)) as pool:
        for _ in pool.map(fill, own):
            pass  # raises what the reading of a parameter raised
    torch.set_num_threads(threads)  # new threads take what any thread has set last
    return weights


def _allocate(parameters: list[Parameter], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Empty tensors. On CPU they lie one behind the other, in large pages: a decode step reads them all, in this order."""
    if device.type != "cpu":
        return [torch.empty(parameter.shape, dtype=dtype, device=device) for parameter in parameters]
    sizes = [parameter.num_elements for parameter in parameters]
    memory = torch.empty(sum(sizes), dtype=dtype)
    prefer_huge_pages(memory)
    parts = memory.split(sizes)
    return [
        part.view(parameter.shape) if parameter.alias_of is None else part
        for parameter, part in zip(parameters, parts, strict=True)
    ]

"""Loading one shard's weights: each parameter is allocated once and filled piece by piece."""

import torch

from ...parallel.shard_map import Shard
from ..models.checkpoint import Checkpoint
from ..models.parameters import local_parameters
from ..models.spec import ModelSpec


def load_weights(
    checkpoint: Checkpoint, spec: ModelSpec, shard: Shard, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """The shard's parameters by the names of `models/parameters.py`, contiguous; an alias is the same tensor object.

    Peak memory is the parameters themselves plus one chunk of a few MiB on the host.
    """
    weights: dict[str, torch.Tensor] = {}
    for parameter in local_parameters(spec, shard):
        if parameter.alias_of is not None:
            weights[parameter.name] = weights[parameter.alias_of]
            continue
        # A sum is rounded once, so it is made in float32 (norms of Gemma; small).
        read_as = torch.float32 if parameter.added else dtype
        tensor = torch.empty(parameter.shape, dtype=read_as, device=device)
        for piece in parameter.pieces:
            target = tensor.narrow(piece.axis, piece.offset, len(piece.indices))
            checkpoint.read_into(target, piece.tensor, piece.axis, piece.indices)
        weights[parameter.name] = (tensor + parameter.added).to(dtype) if parameter.added else tensor
    return weights

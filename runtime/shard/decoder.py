"""The decoder of one shard: embedding, layers, LM head, over this rank's heads, columns and rows.

Names in shapes: T tokens of the step, H hidden_size, Hq and Hk local query and KV heads,
D head_dim, I local MLP columns, S sampling rows, V local vocabulary rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import ops
from ...parallel.embedding import LMHead, VocabParallelEmbedding
from ...parallel.group import Group
from ...parallel.linear import ColumnParallelLinear, RowParallelLinear
from ...parallel.shard_map import Shard
from ..models.spec import ModelSpec, RotarySpec
from .kv_cache import KVCache
from .slots import StepInputs


@dataclass(frozen=True)
class DecoderLayer:
    """One layer's parameters on this rank."""

    input_norm: Tensor  # [H]
    qkv: ColumnParallelLinear  # [(Hq + 2 * Hk) * D, H]
    o: RowParallelLinear  # [H, Hq * D]
    post_attention_norm: Tensor  # [H]
    gate_up: ColumnParallelLinear  # [2 * I, H]
    down: RowParallelLinear  # [H, I]


class Decoder:
    """Runs the tokens of one step through the model; keeps K and V in `cache`."""

    def __init__(
        self, spec: ModelSpec, shard: Shard, weights: dict[str, Tensor], group: Group, max_positions: int
    ) -> None:
        self._eps = spec.rms_norm_eps
        self._head_dim = spec.head_dim
        self._scale = spec.head_dim**-0.5
        self._windows = spec.layer_windows
        self._heads = ops.HeadLayout(shard.q_per_kv)
        self._embed = VocabParallelEmbedding(weights["embed"], shard.vocab_rows, group)
        self._layers = [
            DecoderLayer(
                input_norm=weights[f"layers.{i}.input_norm"],
                qkv=ColumnParallelLinear(weights[f"layers.{i}.qkv"]),
                o=RowParallelLinear(weights[f"layers.{i}.o"], group, f"layer {i} o_proj"),
                post_attention_norm=weights[f"layers.{i}.post_attention_norm"],
                gate_up=ColumnParallelLinear(weights[f"layers.{i}.gate_up"]),
                down=RowParallelLinear(weights[f"layers.{i}.down"], group, f"layer {i} down_proj"),
            )
            for i in range(spec.num_layers)
        ]
        self._final_norm = weights["final_norm"]
        self._lm_head = LMHead(weights["lm_head"])
        self._cos_sin = rotary_table(spec.rotary, max_positions, self._final_norm.device)

    def forward(self, inputs: StepInputs, cache: KVCache) -> Tensor:
        """Logits [S, V] in fp32 of the vocabulary rows of this rank, for the sampling rows."""
        residual = self._embed(inputs.token_ids)  # [T, H]
        hidden = ops.rms_norm(residual, self._layers[0].input_norm, self._eps)
        for i, layer in enumerate(self._layers):
            hidden = self._attention(i, layer, hidden, inputs, cache)
            hidden = ops.add_rms_norm(hidden, residual, layer.post_attention_norm, self._eps)
            hidden = layer.down(ops.silu_mul(layer.gate_up(hidden)))
            last = i + 1 == len(self._layers)
            norm = self._final_norm if last else self._layers[i + 1].input_norm
            hidden = ops.add_rms_norm(hidden, residual, norm, self._eps)
        return self._lm_head(hidden[inputs.sample_tokens])

    def _attention(
        self, index: int, layer: DecoderLayer, hidden: Tensor, inputs: StepInputs, cache: KVCache
    ) -> Tensor:
        num_tokens = hidden.shape[0]
        heads = self._heads
        qkv = layer.qkv(hidden).view(num_tokens, -1, self._head_dim)
        q, k, v = qkv.split([heads.num_q_heads, heads.num_kv_heads, heads.num_kv_heads], dim=1)
        kv = cache.layers[index]
        ops.rotary_kv_write(q, k, v, self._cos_sin, inputs.positions, kv, inputs.slot_mapping)
        out = ops.paged_attention(q, kv, inputs.attention, heads, self._scale, window=self._windows[index])
        return layer.o(out.view(num_tokens, -1))


def rotary_table(rotary: RotarySpec, max_positions: int, device: torch.device) -> Tensor:
    """[max_positions, rotary_dim] fp32: the cosines of every angle of a position, then the sines."""
    frequencies = torch.tensor(rotary.inv_freq(), dtype=torch.float32, device=device)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32, device=device), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1)

"""The decoder of one shard: embedding, layers, LM head, over this rank's heads, columns and rows.

Names in shapes: T tokens of the step, H hidden_size, Hq and Hk local query and KV heads,
D head_dim, I local MLP columns, S sampling rows, V local vocabulary rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.linear_ops import LinearWeight
from ...kernels.weight_codes import WeightCodes
from ...parallel.embedding import LMHead, VocabParallelEmbedding
from ...parallel.group import Group
from ...parallel.linear import ColumnParallelGatedLinear, ColumnParallelLinear, RowParallelLinear
from ...parallel.norm import SplitWidth, SplitWidthRMSNorm
from ...parallel.shard_map import Shard
from ..models.spec import ModelSpec, RotarySpec
from .kv_cache import KVCache
from .slots import StepInputs

Weights = Mapping[str, Tensor | WeightCodes]


@dataclass(frozen=True)
class DecoderLayer:
    """One layer's parameters on this rank; which norms there are depends on the family."""

    attention_norm: Tensor | None  # [H]
    qkv: ColumnParallelLinear  # [(Hq + 2 * Hk) * D, H]
    q_norm: Tensor | None  # [D]: of each head
    k_norm: Tensor | None  # [D]
    qk_width_norm: SplitWidthRMSNorm | None  # over the heads of all ranks
    o: RowParallelLinear  # [H, Hq * D]
    attention_out_norm: Tensor | None  # [H]
    mlp_norm: Tensor | None  # [H]
    gate_up: ColumnParallelGatedLinear  # [2 * I, H]
    down: RowParallelLinear  # [H, I]
    mlp_out_norm: Tensor | None  # [H]
    window: int | None  # positions a query sees
    group: int  # of layers with this window
    cos_sin: Tensor  # [max_positions, rotary_dim]


class Decoder:
    """Runs the tokens of one step through the model; keeps K and V in `cache`."""

    def __init__(
        self, spec: ModelSpec, shard: Shard, weights: Weights, group: Group, max_positions: int
    ) -> None:
        """Takes `weights` over: matrices may be packed in place, see `LinearWeight.take`."""
        head = LinearWeight.take(weights["lm_head"])
        tied = weights["embed"] is weights["lm_head"]
        self._eps = spec.rms_norm_eps
        self._head_dim = spec.head_dim
        self._scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
        self._attention_soft_cap = spec.attention_soft_cap
        self._logit_soft_cap = spec.logit_soft_cap
        self._heads = ops.HeadLayout(shard.q_per_kv)
        self._final_norm = _vectors(weights)["final_norm"]
        scale = 1.0 if spec.embedding_scale is None else spec.embedding_scale
        self._embed = VocabParallelEmbedding(
            head if tied else LinearWeight(weights["embed"]),
            shard.vocab_rows,
            group,
            torch.tensor(scale, dtype=self._final_norm.dtype).item(),
        )
        self._lm_head = LMHead(head)
        tables = {
            rotary: rotary_table(rotary, max_positions, self._final_norm.device) for rotary in spec.rotaries
        }
        self._layers = [
            _layer(spec, shard, weights, group, i, tables[spec.layer_rotary(i)])
            for i in range(spec.num_layers)
        ]

    def forward(self, inputs: StepInputs, cache: KVCache) -> Tensor:
        """What the LM head reads, [T, H]: the last layer's output, normed."""
        residual = self._embed(inputs.token_ids)  # [T, H]
        norm = self._layers[0].attention_norm
        hidden = residual if norm is None else ops.rms_norm(residual, norm, self._eps)
        for i, layer in enumerate(self._layers):
            hidden = self._attention(i, layer, hidden, inputs, cache)
            hidden = join(hidden, residual, layer.attention_out_norm, layer.mlp_norm, self._eps)
            hidden = layer.down(layer.gate_up(hidden))
            last = i + 1 == len(self._layers)
            norm = self._final_norm if last else self._layers[i + 1].attention_norm
            hidden = join(hidden, residual, layer.mlp_out_norm, norm, self._eps)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Of some of the rows that `forward` gave, [S, H]: [S, V] in fp32, of the vocabulary rows of this rank."""
        logits = self._lm_head(hidden)
        cap = self._logit_soft_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _attention(
        self, index: int, layer: DecoderLayer, hidden: Tensor, inputs: StepInputs, cache: KVCache
    ) -> Tensor:
        num_tokens = hidden.shape[0]
        heads = self._heads
        qkv = layer.qkv(hidden)
        if layer.qk_width_norm is not None:
            q_width, k_width = heads.num_q_heads * self._head_dim, heads.num_kv_heads * self._head_dim
            layer.qk_width_norm(qkv[:, :q_width], qkv[:, q_width : q_width + k_width])
        q, k, v = qkv.view(num_tokens, -1, self._head_dim).split(
            [heads.num_q_heads, heads.num_kv_heads, heads.num_kv_heads], dim=1
        )
        kv = cache.layers[index]
        ops.rotary_kv_write(
            q,
            k,
            v,
            layer.cos_sin,
            inputs.positions,
            kv,
            inputs.slot_mappings[layer.group],
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=self._eps,
        )
        out = ops.paged_attention(
            q,
            kv,
            inputs.attention[layer.group],
            heads,
            self._scale,
            window=layer.window,
            soft_cap=self._attention_soft_cap,
        )
        return layer.o(out.view(num_tokens, -1))


def join(
    x: Tensor, residual: Tensor, out_norm: Tensor | None, next_norm: Tensor | None, eps: float
) -> Tensor:
    """Adds x [T, H], normed by `out_norm`, to the residual stream in place; returns what the next part reads.

    That is rms_norm(residual), or without `next_norm` the residual stream itself, which must not be written to.
    """
    if out_norm is not None:
        x = ops.rms_norm(x, out_norm, eps)
    if next_norm is None:
        return residual.add_(x)
    return ops.add_rms_norm(x, residual, next_norm, eps)


def rotary_table(rotary: RotarySpec, max_positions: int, device: torch.device) -> Tensor:
    """[max_positions, rotary_dim] fp32: the cosines of every angle of a position, then the sines."""
    frequencies = torch.tensor(rotary.inv_freq(), dtype=torch.float32, device=device)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32, device=device), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1).mul_(rotary.magnitude)


def _layer(
    spec: ModelSpec, shard: Shard, weights: Weights, group: Group, index: int, cos_sin: Tensor
) -> DecoderLayer:
    name = f"layers.{index}."
    wide = spec.qk_norm == "width"
    vectors = _vectors(weights)

    def matrix(part: str) -> LinearWeight:
        return LinearWeight.take(weights[name + part])

    return DecoderLayer(
        attention_norm=vectors.get(name + "attention_norm"),
        qkv=ColumnParallelLinear(matrix("qkv"), vectors.get(name + "qkv_bias")),
        q_norm=None if wide else vectors.get(name + "q_norm"),
        k_norm=None if wide else vectors.get(name + "k_norm"),
        qk_width_norm=_qk_width_norm(spec, shard, vectors, group, index) if wide else None,
        o=RowParallelLinear(matrix("o"), group, f"layer {index} o_proj"),
        attention_out_norm=vectors.get(name + "attention_out_norm"),
        mlp_norm=vectors.get(name + "mlp_norm"),
        gate_up=ColumnParallelGatedLinear(
            LinearWeight.take_gated(weights[name + "gate_up"]), spec.activation
        ),
        down=RowParallelLinear(matrix("down"), group, f"layer {index} down_proj"),
        mlp_out_norm=vectors.get(name + "mlp_out_norm"),
        window=spec.layer_windows[index],
        group=spec.layer_group(index),
        cos_sin=cos_sin,
    )


def _vectors(weights: Weights) -> Mapping[str, Tensor]:
    """Norms and biases, which are never kept as codes."""
    return {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}


def _qk_width_norm(
    spec: ModelSpec, shard: Shard, vectors: Mapping[str, Tensor], group: Group, index: int
) -> SplitWidthRMSNorm:
    # A KV head that several ranks hold is counted by the one with its first query head.
    elsewhere = shard.kv_heads.start * shard.group_size < shard.q_heads.start
    q = SplitWidth(vectors[f"layers.{index}.q_norm"], spec.num_q_heads * spec.head_dim, slice(None))
    k = SplitWidth(
        vectors[f"layers.{index}.k_norm"],
        spec.num_kv_heads * spec.head_dim,
        slice(spec.head_dim if elsewhere else 0, None),
    )
    return SplitWidthRMSNorm((q, k), spec.rms_norm_eps, group, f"layer {index} qk_norm")

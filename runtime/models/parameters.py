"""The tensors of a checkpoint and the parameters a shard makes of them: names and integers only, no torch.

`local_parameters` is the one list that the loader allocates by and the memory plan sums, so both agree.

    parameter                     local shape                           made of
    embed                         [vocab_rows, hidden]                  embed_tokens rows
    layers.N.input_norm           [hidden]                              whole
    layers.N.qkv                  [(q + 2 kv) * head_dim, hidden]       rows of q_proj | k_proj | v_proj
    layers.N.o                    [hidden, q * head_dim]                o_proj columns
    layers.N.post_attention_norm  [hidden]                              whole
    layers.N.gate_up              [2 * mlp_columns, hidden]             rows of gate_proj | up_proj
    layers.N.down                 [hidden, mlp_columns]                 down_proj columns
    final_norm                    [hidden]                              whole
    lm_head                       [vocab_rows, hidden]                  lm_head rows, or alias of embed
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...parallel.shard_map import Shard
from .spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Piece:
    """`indices` of one axis of a checkpoint tensor, put at `offset` on the same axis of the parameter."""

    tensor: str
    axis: int
    indices: range
    offset: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """One local tensor. `alias_of` names the parameter whose storage it shares; it then has no pieces."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    alias_of: str | None = None

    @property
    def num_elements(self) -> int:
        """Elements this parameter adds to storage: 0 for an alias."""
        return 0 if self.alias_of else math.prod(self.shape)


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the checkpoint must have, by Hugging Face's names for Llama."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_width, kv_width = spec.num_q_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (q_width, hidden),
            prefix + "self_attn.k_proj.weight": (kv_width, hidden),
            prefix + "self_attn.v_proj.weight": (kv_width, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, q_width),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
        }
    tensors["model.norm.weight"] = (hidden,)
    if not spec.tie_embeddings:
        tensors["lm_head.weight"] = (spec.vocab_size, hidden)
    return tensors


def local_parameters(spec: ModelSpec, shard: Shard) -> list[Parameter]:
    """Every parameter of one shard, in the order the decoder uses them."""
    hidden = spec.hidden_size
    q_rows, kv_rows = _head_rows(shard.q_heads, spec.head_dim), _head_rows(shard.kv_heads, spec.head_dim)
    columns, vocab_rows = shard.mlp_columns, shard.vocab_rows

    parameters = [_rows("embed", hidden, [("model.embed_tokens.weight", vocab_rows)])]
    for layer in range(spec.num_layers):
        local, source = f"layers.{layer}.", f"model.layers.{layer}."
        attention, mlp = source + "self_attn.", source + "mlp."
        parameters += [
            _whole(local + "input_norm", hidden, source + "input_layernorm.weight"),
            _rows(
                local + "qkv",
                hidden,
                [
                    (attention + "q_proj.weight", q_rows),
                    (attention + "k_proj.weight", kv_rows),
                    (attention + "v_proj.weight", kv_rows),
                ],
            ),
            _columns(local + "o", hidden, attention + "o_proj.weight", q_rows),
            _whole(local + "post_attention_norm", hidden, source + "post_attention_layernorm.weight"),
            _rows(
                local + "gate_up",
                hidden,
                [(mlp + "gate_proj.weight", columns), (mlp + "up_proj.weight", columns)],
            ),
            _columns(local + "down", hidden, mlp + "down_proj.weight", columns),
        ]
    parameters.append(_whole("final_norm", hidden, "model.norm.weight"))
    if spec.tie_embeddings:
        parameters.append(Parameter("lm_head", (len(vocab_rows), hidden), (), alias_of="embed"))
    else:
        parameters.append(_rows("lm_head", hidden, [("lm_head.weight", vocab_rows)]))
    return parameters


def weight_bytes(spec: ModelSpec, shard: Shard, dtype_bytes: int) -> int:
    """Storage bytes of one shard's parameters at `dtype_bytes` per element, aliases counted once."""
    return sum(parameter.num_elements for parameter in local_parameters(spec, shard)) * dtype_bytes


def _head_rows(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


def _whole(name: str, size: int, tensor: str) -> Parameter:
    return Parameter(name, (size,), (Piece(tensor, 0, range(size), 0),))


def _rows(name: str, width: int, sources: Sequence[tuple[str, range]]) -> Parameter:
    pieces, offset = [], 0
    for tensor, rows in sources:
        pieces.append(Piece(tensor, 0, rows, offset))
        offset += len(rows)
    return Parameter(name, (offset, width), tuple(pieces))


def _columns(name: str, height: int, tensor: str, columns: range) -> Parameter:
    return Parameter(name, (height, len(columns)), (Piece(tensor, 1, columns, 0),))

"""The tensors of a checkpoint and the parameters a shard makes of them: names and integers only, no torch.

`local_parameters` is the one list that the loader allocates by and the memory plan sums, so both agree.

    parameter                     local shape                           made of
    embed                         [vocab_rows, hidden]                  embed_tokens rows
    layers.N.attention_norm       [hidden]                              whole
    layers.N.qkv                  [(q + 2 kv) * head_dim, hidden]       rows of q_proj | k_proj | v_proj
    layers.N.qkv_bias             [(q + 2 kv) * head_dim]               the same rows of the biases
    layers.N.q_norm               [head_dim] or [q * head_dim]          whole, or the rows of this shard's heads
    layers.N.k_norm               [head_dim] or [kv * head_dim]         likewise
    layers.N.o                    [hidden, q * head_dim]                o_proj columns
    layers.N.attention_out_norm   [hidden]                              whole
    layers.N.mlp_norm             [hidden]                              whole
    layers.N.gate_up              [2 * mlp_columns, hidden]             rows of gate_proj | up_proj
    layers.N.down                 [hidden, mlp_columns]                 down_proj columns
    layers.N.mlp_out_norm         [hidden]                              whole
    final_norm                    [hidden]                              whole
    lm_head                       [vocab_rows, hidden]                  lm_head rows, or alias of embed

A model has those norms and biases that its spec has. Tensors are named by `ModelSpec.names`. A matrix may be kept as codes
of groups of 32 columns if groups are whole on any shard: if hidden (embed, qkv, gate_up, lm_head), head_dim (o) or the whole
model's MLP columns (down) are a multiple of 32. So groups are those of the whole model, on any number of shards.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ...parallel.shard_map import Shard
from .spec import ModelSpec
from .weight_formats import BLOCK, WIDE, BlockFormat, WeightFormats, block_bytes

_ALIGNMENT = 4  # bytes: any number of scales may come before a float32


@dataclass(frozen=True, slots=True)
class Piece:
    """`indices` of one axis of a checkpoint tensor, put at `offset` on the same axis of the parameter."""

    tensor: str
    axis: int
    indices: range
    offset: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """One local tensor. `alias_of` names the parameter whose storage it shares; it then has no pieces.

    `added` is added to every element that was read. `unit`: shards cut the columns at multiples of it; 0 for a vector.
    `format`: of a matrix that is kept as codes.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    alias_of: str | None = None
    added: float = 0.0
    unit: int = 0
    format: BlockFormat | None = None

    @property
    def num_elements(self) -> int:
        """Elements this parameter adds to storage: 0 for an alias."""
        return 0 if self.alias_of else math.prod(self.shape)

    def num_bytes(self, dtype_bytes: int) -> int:
        """Of its storage, where numbers have `dtype_bytes` each."""
        if self.format is None:
            return self.num_elements * dtype_bytes
        blocks = self.num_elements // BLOCK * block_bytes(self.format)
        return -(-blocks // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class _Part:
    """`height` rows of tensor `name` (without ".weight") from row `start` on: all, unless parts share the name."""

    name: str
    start: int
    height: int


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the checkpoint must have, by the names of `spec`."""
    hidden, inner, names = spec.hidden_size, spec.intermediate_size, spec.names
    q_width, kv_width = spec.num_q_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for layer in range(spec.num_layers):
        prefix = _prefix(layer)
        for norm in (names.attention_norm, names.attention_out_norm, names.mlp_norm, names.mlp_out_norm):
            if norm is not None:
                tensors[f"{prefix}{norm}.weight"] = (hidden,)
        for part in (*_qkv_parts(spec), *_gate_up_parts(spec)):
            tensors[f"{prefix}{part.name}.weight"] = (part.start + part.height, hidden)
        if spec.qkv_bias:
            for part in _qkv_parts(spec):
                tensors[f"{prefix}{part.name}.bias"] = (part.start + part.height,)
        if spec.qk_norm is not None:
            wide = spec.qk_norm == "width"
            tensors[f"{prefix}{names.q_norm}.weight"] = (q_width if wide else spec.head_dim,)
            tensors[f"{prefix}{names.k_norm}.weight"] = (kv_width if wide else spec.head_dim,)
        tensors[f"{prefix}{names.o}.weight"] = (hidden, q_width)
        tensors[f"{prefix}{names.down}.weight"] = (hidden, inner)
    tensors["model.norm.weight"] = (hidden,)
    if not spec.tie_embeddings:
        tensors["lm_head.weight"] = (spec.vocab_size, hidden)
    return tensors


def local_parameters(spec: ModelSpec, shard: Shard, formats: WeightFormats = WIDE) -> list[Parameter]:
    """Every parameter of one shard, in the order the decoder uses them."""
    hidden, vocab_rows = spec.hidden_size, shard.vocab_rows
    embed = _Part("model.embed_tokens", 0, spec.vocab_size)
    parameters = [_rows("embed", "weight", [(embed, vocab_rows)], hidden)]
    for layer in range(spec.num_layers):
        parameters += _layer_parameters(spec, shard, layer)
    parameters.append(_norm(spec, "final_norm", "model.norm"))
    if spec.tie_embeddings:
        parameters.append(Parameter("lm_head", (len(vocab_rows), hidden), (), alias_of="embed"))
    else:
        head = _Part("lm_head", 0, spec.vocab_size)
        parameters.append(_rows("lm_head", "weight", [(head, vocab_rows)], hidden))
    return [
        replace(parameter, format=_format(parameter, formats))
        if parameter.unit and parameter.unit % BLOCK == 0
        else parameter
        for parameter in parameters
    ]


def _format(matrix: Parameter, formats: WeightFormats) -> BlockFormat | None:
    tensors = (piece.tensor for piece in matrix.pieces)
    return formats.of(tensors, of_vocabulary=matrix.name in ("embed", "lm_head"))


def _layer_parameters(spec: ModelSpec, shard: Shard, layer: int) -> list[Parameter]:
    hidden, names, columns = spec.hidden_size, spec.names, shard.mlp_columns
    local, prefix = f"layers.{layer}.", _prefix(layer)
    q_rows, kv_rows = _head_rows(shard.q_heads, spec.head_dim), _head_rows(shard.kv_heads, spec.head_dim)
    qkv = list(zip(_qkv_parts(spec, prefix), (q_rows, kv_rows, kv_rows), strict=True))
    gate_up = [(part, columns) for part in _gate_up_parts(spec, prefix)]

    def norms(**named: str | None) -> list[Parameter]:
        return [_norm(spec, local + own, prefix + name) for own, name in named.items() if name is not None]

    parameters = norms(attention_norm=names.attention_norm)
    parameters.append(_rows(local + "qkv", "weight", qkv, hidden))
    if spec.qkv_bias:
        parameters.append(_rows(local + "qkv_bias", "bias", qkv))
    if spec.qk_norm is not None:
        whole = range(spec.head_dim)
        q_range, k_range = (q_rows, kv_rows) if spec.qk_norm == "width" else (whole, whole)
        parameters.append(_norm(spec, local + "q_norm", prefix + names.q_norm, q_range))
        parameters.append(_norm(spec, local + "k_norm", prefix + names.k_norm, k_range))
    parameters.append(_columns(local + "o", hidden, f"{prefix}{names.o}.weight", q_rows, spec.head_dim))
    parameters += norms(attention_out_norm=names.attention_out_norm, mlp_norm=names.mlp_norm)
    parameters.append(_rows(local + "gate_up", "weight", gate_up, hidden))
    down = f"{prefix}{names.down}.weight"
    parameters.append(_columns(local + "down", hidden, down, columns, spec.intermediate_size))
    return parameters + norms(mlp_out_norm=names.mlp_out_norm)


def weight_bytes(spec: ModelSpec, shard: Shard, dtype_bytes: int, formats: WeightFormats = WIDE) -> int:
    """Storage bytes of one shard's parameters at `dtype_bytes` a number, aliases counted once."""
    return sum(parameter.num_bytes(dtype_bytes) for parameter in local_parameters(spec, shard, formats))


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def _qkv_parts(spec: ModelSpec, prefix: str = "") -> list[_Part]:
    q_width, kv_width = spec.num_q_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    names = spec.names
    return _parts(prefix, ((names.q, q_width), (names.k, kv_width), (names.v, kv_width)))


def _gate_up_parts(spec: ModelSpec, prefix: str = "") -> list[_Part]:
    return _parts(prefix, ((name, spec.intermediate_size) for name in (spec.names.gate, spec.names.up)))


def _parts(prefix: str, heights: Iterable[tuple[str, int]]) -> list[_Part]:
    """Parts of one name lie one below the other in one tensor."""
    filled: Counter[str] = Counter()
    parts = []
    for name, height in heights:
        parts.append(_Part(prefix + name, filled[name], height))
        filled[name] += height
    return parts


def _head_rows(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


def _norm(spec: ModelSpec, name: str, tensor: str, elements: range | None = None) -> Parameter:
    if elements is None:
        elements = range(spec.hidden_size)
    piece = Piece(f"{tensor}.weight", 0, elements, 0)
    return Parameter(name, (len(elements),), (piece,), added=spec.norm_offset)


def _rows(
    name: str, kind: str, sources: Sequence[tuple[_Part, range]], width: int | None = None
) -> Parameter:
    """Rows of parts one below the other; `kind` is "weight", or "bias" for vectors (no width)."""
    pieces, offset = [], 0
    for part, rows in sources:
        stored = range(part.start + rows.start, part.start + rows.stop)
        pieces.append(Piece(f"{part.name}.{kind}", 0, stored, offset))
        offset += len(rows)
    shape = (offset,) if width is None else (offset, width)
    return Parameter(name, shape, tuple(pieces), unit=width or 0)


def _columns(name: str, height: int, tensor: str, columns: range, unit: int) -> Parameter:
    return Parameter(name, (height, len(columns)), (Piece(tensor, 1, columns, 0),), unit=unit)

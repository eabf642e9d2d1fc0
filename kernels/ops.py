"""The door to the kernels: formulas, shapes and dtypes of every operation, and the choice of the back end.

Tensors on CUDA go to the Triton kernels, tensors on CPU to C, or to torch where none can be compiled. `reference.py`
defines the same operations in plain torch. All arithmetic is float32 or better, whatever the dtype of the tensors; each
result is rounded once.

T is the number of tokens in a step, D the head dimension, Hq and Hk the query and KV heads of this shard. Each
function raises ValueError when a shape, dtype or device does not fit; the contents of index tensors (positions,
slots, block tables) are the caller's promise, since reading them would stop the device.
"""

from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from .cache import FORMAT_OF_DTYPE, SCALE_DTYPE, CacheFormat, KVLayer
from .checks import check as _check
from .checks import check_rows as _check_rows
from .metadata import AttentionMetadata, HeadLayout

__all__ = [
    "AttentionMetadata",
    "CacheFormat",
    "HeadLayout",
    "KVLayer",
    "add_rms_norm",
    "gelu_mul",
    "load",
    "paged_attention",
    "rms_norm",
    "rotary_kv_write",
    "silu_mul",
]


class Backend(Protocol):
    """What `kernels.cpu` and `kernels.triton` offer. Arguments are already checked."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def rotary_kv_write(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_sin: Tensor,
        positions: Tensor,
        cache: KVLayer,
        slot_mapping: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> None: ...

    def silu_mul(self, gate_up: Tensor) -> Tensor: ...

    def gelu_mul(self, gate_up: Tensor) -> Tensor: ...

    def paged_attention(
        self,
        q: Tensor,
        cache: KVLayer,
        meta: AttentionMetadata,
        heads: HeadLayout,
        scale: float,
        window: int | None,
        soft_cap: float | None,
        sinks: Tensor | None,
        lse: Tensor | None,
    ) -> Tensor: ...


_PACKAGES = {"cuda": ".triton", "cpu": ".cpu"}


@cache
def _backend(device_type: str) -> Backend:
    """The back end of a device type; triton is imported only when the first CUDA tensor comes."""
    if device_type not in _PACKAGES:
        raise ValueError(f"device: expected one of {', '.join(_PACKAGES)}, got {device_type}")
    return cast(Backend, import_module(_PACKAGES[device_type], __package__))


def load(device_type: str) -> None:
    """Have the code ready that is compiled once for all shapes, so that no step waits for a compiler: the C of the CPU.

    Triton's kernels are compiled for the shapes of a call, at their first.
    """
    if device_type == "cpu":
        import_module(".cpu.library", __package__).load_all()


def _check_cache(cache: KVLayer, q: Tensor, num_kv_heads: int, block_size: int | str) -> None:
    """Refuses a cache of another shape, and one with gaps: the kernels work out where a row lies from the shape."""
    quantised = cache.k.dtype in FORMAT_OF_DTYPE
    width = q.shape[2] // 2 if cache.format == "int4" else q.shape[2]
    dtype = cache.k.dtype if quantised else q.dtype
    shape = ("num_blocks", num_kv_heads, block_size, width)
    tensors = [("cache.k", cache.k, shape, dtype), ("cache.v", cache.v, cache.k.shape, dtype)]
    if quantised:
        for name, scale in (("cache.k_scale", cache.k_scale), ("cache.v_scale", cache.v_scale)):
            if scale is None:
                raise ValueError(f"{name}: expected a tensor with a cache of {dtype}, got None")
            tensors.append((name, scale, cache.k.shape[:3], SCALE_DTYPE))
    for name, tensor, expected, of_dtype in tensors:
        _check(name, tensor, expected, q, of_dtype)
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns y = x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension (Zhang & Sennrich, 2019).

    x       [T, H], rows of adjacent elements
    weight  [H], dtype of x
    returns [T, H], dtype of x, contiguous
    """
    _check("x", x, ("T", "H"), x, x.dtype)
    _check("weight", weight, (x.shape[1],), x, x.dtype)
    _check_rows("x", x)
    _check_rows("weight", weight)
    return _backend(x.device.type).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to the residual stream in place and returns rms_norm(residual).

    x         [T, H], rows of adjacent elements
    residual  [T, H], dtype of x, rows of adjacent elements; becomes residual + x, rounded to its dtype before it is normed
    weight    [H], dtype of x
    returns   [T, H], dtype of x, contiguous
    """
    _check("x", x, ("T", "H"), x, x.dtype)
    _check("residual", residual, x.shape, x, x.dtype)
    _check("weight", weight, (x.shape[1],), x, x.dtype)
    _check_rows("x", x)
    _check_rows("residual", residual)
    _check_rows("weight", weight)
    return _backend(x.device.type).add_rms_norm(x, residual, weight, eps)


def rotary_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    cache: KVLayer,
    slot_mapping: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """All that happens between the qkv product and attention, in one pass over q, k and v.

    1. With q_norm and k_norm, every head becomes rms_norm(head) * weight (QK norm, Henry et al., 2020).
    2. Heads of q and k turn by their token's position (RoPE, Su et al., 2021) with the "rotate half" pairing of
       GPT-NeoX and Hugging Face: with r = rotary_dim / 2, channels c and c + r form a pair (a, b), and c < r selects
       the angle:  a' = a cos - b sin,  b' = b cos + a sin.  Channels from rotary_dim on are left alone.
    3. For an int4 cache, q and k are then multiplied by one orthonormal matrix of Hadamard's, which leaves every q . k
       as it was and spreads the few channels that are much larger than the others over many (QuaRot, Ashkboos et al.,
       2024). Channels c and c + D / 2 become a + b and a - b; then, with n the largest power of two that divides
       D / 2, channels at distances 1, 2, 4, ... n / 2 in each n of them likewise; all times (2 n)^-1/2.
    4. q is written back; k and v go to row (slot // B, h, slot % B) of the cache, in its format. With x a key or
       value, every step in float32 and `round` to nearest even:
         int8  scale = f16(max|x| / 127),  code = clamp(round(x / scale), -127, 127)
         fp8   scale = f16(max|x| / 448),  code = e4m3(clamp(x / scale, -448, 448))
         int4  scale = f16(max|x| / 7.5),  code = clamp(floor(x / scale), -8, 7) + 8, for the value (code - 7.5) scale
       A scale of 0 makes zeros. A NaN or infinity in x makes the scale NaN, so that the row stays visibly broken.

    q                [T, Hq, D], changed in place; k, v [T, Hk, D], not changed. One dtype; may be views of one
                     qkv tensor (last dimension adjacent)
    cos_sin          [max_positions, rotary_dim] float32: cos of the r angles, then sin; rotary_dim <= D, even
    positions        [T] int64, each < max_positions
    cache            written in place
    slot_mapping     [T] int64: block * B + offset, or -1 for a token that is not stored (padding). Two tokens of
                     one call never share a slot.
    q_norm, k_norm   [D] dtype of q, both or none; eps is theirs
    """
    num_tokens, _, head_dim = q.shape if q.dim() == 3 else (0, 0, 0)
    _check("q", q, ("T", "Hq", "D"), q, q.dtype)
    _check("k", k, (num_tokens, "Hk", head_dim), q, q.dtype)
    _check("v", v, k.shape, q, q.dtype)
    _check("cos_sin", cos_sin, ("max_positions", "rotary_dim"), q, torch.float32)
    _check("positions", positions, (num_tokens,), q, torch.int64)
    _check("slot_mapping", slot_mapping, (num_tokens,), q, torch.int64)
    vectors = (
        ("positions", positions),
        ("slot_mapping", slot_mapping),
        ("q_norm", q_norm),
        ("k_norm", k_norm),
    )
    for name, tensor in (("q", q), ("k", k), ("v", v), *vectors):
        if tensor is not None:
            _check_rows(name, tensor)
    if not cos_sin.is_contiguous():
        raise ValueError(f"cos_sin: expected a contiguous tensor, got strides {cos_sin.stride()}")
    _check_cache(cache, q, k.shape[1], "block_size")
    if cos_sin.shape[1] > head_dim or cos_sin.shape[1] % 2:
        raise ValueError(
            f"cos_sin: expected shape [max_positions, even rotary_dim <= {head_dim}], got {list(cos_sin.shape)}"
        )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm, k_norm: expected both or none")
    if q_norm is not None and k_norm is not None:
        _check("q_norm", q_norm, (head_dim,), q, q.dtype)
        _check("k_norm", k_norm, (head_dim,), q, q.dtype)
    _backend(q.device.type).rotary_kv_write(
        q, k, v, cos_sin, positions, cache, slot_mapping, q_norm, k_norm, eps
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    """Returns silu(gate) * up with silu(x) = x / (1 + exp(-x)): the gated activation (SwiGLU, Shazeer, 2020).

    gate_up  [T, 2 * I], rows of adjacent elements: gate, then up. I may be 0.
    returns  [T, I], dtype of gate_up, contiguous
    """
    _check_gate_up(gate_up)
    return _backend(gate_up.device.type).silu_mul(gate_up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """Returns gelu(gate) * up, gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))): GEGLU (Shazeer, 2020).

    The tanh form is what Gemma calls gelu_pytorch_tanh. Shapes and dtypes: as in silu_mul.
    """
    _check_gate_up(gate_up)
    return _backend(gate_up.device.type).gelu_mul(gate_up)


def _check_gate_up(gate_up: Tensor) -> None:
    _check("gate_up", gate_up, ("T", "2 * I"), gate_up, gate_up.dtype)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected shape [T, 2 * I], got {list(gate_up.shape)}")
    _check_rows("gate_up", gate_up)


def paged_attention(
    q: Tensor,
    cache: KVLayer,
    meta: AttentionMetadata,
    heads: HeadLayout,
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Causal attention of this step's queries over the cache, for decode and prefill rows in one call.

    Query token i of row r has position p = context_lens[r] - query_len[r] + i. It sees positions j with
    p - window < j <= p (all j <= p without a window), where key j of KV head h is row
    (block_tables[r, j // B], h, j % B) of the cache:

        x_j = scale * q . k_j,  with a soft cap  x_j = soft_cap * tanh(x_j / soft_cap)  (Gemma 2, 2024)
        lse = log(sum_j exp(x_j) + exp(sink)),   without sinks  log(sum_j exp(x_j))
        out = sum_j exp(x_j - lse) v_j

    K and V are read as stored, also those of this step (call rotary_kv_write first), so that the result does not
    depend on how a prompt was cut into steps. Rows that no position maps to are never used, whatever they hold.
    Output and lse of a query have the same bits alone, in any batch, and however its prompt is cut into steps.

    q            [T, Hq, D], may be a view of a qkv tensor (last dimension adjacent); T = meta.num_tokens
    cache        in any format; auto has the dtype of q
    meta, heads  rows of the step, and which query heads read which KV head
    scale        factor of the logits, usually D ** -0.5
    window       number of visible positions, the query's own included; None = all
    soft_cap     bound of the logits, > 0; None = no bound
    sinks        [Hq] float32: a logit per head that takes part in the sum and has no value (Xiao et al., 2023)
    lse          [T, Hq] float32, written if given
    returns      [T, Hq, D], dtype of q, contiguous
    """
    _check("q", q, (meta.num_tokens, heads.num_q_heads, "D"), q, q.dtype)
    _check_rows("q", q)
    _check_cache(cache, q, heads.num_kv_heads, meta.block_size)
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap: expected more than 0, got {soft_cap}")
    if sinks is not None:
        _check("sinks", sinks, (heads.num_q_heads,), q, torch.float32)
        _check_rows("sinks", sinks)
    if lse is not None:
        _check("lse", lse, (meta.num_tokens, heads.num_q_heads), q, torch.float32)
        _check_rows("lse", lse)
    return _backend(q.device.type).paged_attention(q, cache, meta, heads, scale, window, soft_cap, sinks, lse)

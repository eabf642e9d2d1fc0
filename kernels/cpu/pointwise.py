"""Norms, rotary with the cache write, and gated activations on CPU, in C (pointwise.c), or in torch without a compiler."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..cache import KVLayer
from . import torch_ops
from .library import FORMAT_CODES, load
from .tape import call, empty, no_memory

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_MAX_HEAD_DIM = 1024
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Norm(ctypes.Structure):
    """struct norm"""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "weight", "residual", "out")),
        *((name, _INT) for name in ("num_tokens", "hidden", "x_stride", "residual_stride", "num_threads")),
        ("eps", _FLOAT),
    )


class _Gated(ctypes.Structure):
    """struct gated"""

    _fields_ = (
        *((name, _POINTER) for name in ("gate_up", "out")),
        *((name, _INT) for name in ("num_tokens", "inner", "stride", "gelu", "num_threads")),
    )


class _Rotary(ctypes.Structure):
    """struct rotary"""

    _fields_ = (
        *((name, _POINTER) for name in ("q", "k", "v", "q_norm", "k_norm", "cos_sin", "positions")),
        *((name, _POINTER) for name in ("slot_mapping", "k_cache", "v_cache", "k_scale", "v_scale")),
        *((name, _INT) for name in ("num_tokens", "num_q_heads", "num_kv_heads", "head_dim", "half")),
        *((name, _INT) for name in ("block_size", "cache_format", "q_stride", "q_head_stride", "k_stride")),
        *((name, _INT) for name in ("k_head_stride", "v_stride", "v_head_stride", "num_threads")),
        ("eps", _FLOAT),
    )


def _function(name: str, dtype: torch.dtype) -> Any:
    """The C function of a dtype, or None."""
    library = load("pointwise.c")
    if library is None or dtype not in _NAMES:
        return None
    return getattr(library, f"{_NAMES[dtype]}_{name}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, residual, weight, eps)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    function = _function("rms_norm", x.dtype)
    if function is None:
        if residual is not None:
            x = residual.add_(x)
        return torch_ops.rms_norm(x, weight, eps)
    tokens, hidden = x.shape
    out = empty((tokens, hidden), x.dtype)
    pointer, stride = (None, 0) if residual is None else (residual.data_ptr(), residual.stride(0))
    threads = torch.get_num_threads()
    arguments = _Norm(
        x.data_ptr(),
        weight.data_ptr(),
        pointer,
        out.data_ptr(),
        tokens,
        hidden,
        x.stride(0),
        stride,
        threads,
        eps,
    )
    call(function, arguments, no_memory)
    return out


def rotary_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    cache: KVLayer,
    slot_mapping: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    function = _function("rotary_kv_write", q.dtype)
    if function is None or q.shape[2] > _MAX_HEAD_DIM:
        torch_ops.rotary_kv_write(q, k, v, cos_sin, positions, cache, slot_mapping, q_norm, k_norm, eps)
        return
    pointers = (q, k, v, q_norm, k_norm, cos_sin, positions, slot_mapping)
    stored = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    arguments = _Rotary(
        *(None if x is None else x.data_ptr() for x in pointers + stored),
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        cos_sin.shape[1] // 2,
        cache.block_size,
        FORMAT_CODES[cache.k.dtype],
        *(stride for x in (q, k, v) for stride in x.stride()[:2]),
        torch.get_num_threads(),
        eps,
    )
    call(function, arguments, no_memory)


def silu_mul(gate_up: Tensor) -> Tensor:
    return _gated(gate_up, "silu")


def gelu_mul(gate_up: Tensor) -> Tensor:
    return _gated(gate_up, "gelu")


def _gated(gate_up: Tensor, activation: str) -> Tensor:
    function = _function("gated", gate_up.dtype)
    if function is None:
        return torch_ops.gated(gate_up, activation)
    tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = empty((tokens, inner), gate_up.dtype)
    gelu, threads = int(activation == "gelu"), torch.get_num_threads()
    arguments = _Gated(gate_up.data_ptr(), out.data_ptr(), tokens, inner, gate_up.stride(0), gelu, threads)
    call(function, arguments, no_memory)
    return out

"""Compiles every Triton kernel for GPUs that are not here and prints one JSON line per kernel and target.

Run by test_compile.py in a process of its own, without TRITON_INTERPRET: what is imported under that variable
cannot be compiled. Nothing is launched and no driver is needed.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from kvshard.kernels.cache import CacheFormat
from kvshard.kernels.tiles import ACTIVATION_BLOCK, attention_tiles, rotary_tile, row_tile
from kvshard.kernels.triton.activation import gated_activation_kernel
from kvshard.kernels.triton.attention_kernel import attention_kernel
from kvshard.kernels.triton.combine import combine_kernel
from kvshard.kernels.triton.norm import add_rms_norm_kernel, rms_norm_kernel
from kvshard.kernels.triton.rotary_kv_write import rotary_kv_write_kernel

# Shared memory that one block may use, by compute capability (CUDA programming guide, table of technical limits).
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448}
INDEX_POINTERS = {
    "items_ptr",
    "combined_ptr",
    "query_start_ptr",
    "context_lens_ptr",
    "block_tables_ptr",
    "head_groups_ptr",
}
FLOAT_POINTERS = {"partial_out_ptr", "partial_lse_ptr", "cos_sin_ptr", "sinks_ptr", "lse_ptr"}
LONG_POINTERS = {"positions_ptr", "slot_mapping_ptr"}
CACHE_POINTERS = {"k_cache_ptr", "v_cache_ptr"}
SCALE_POINTERS = {"k_scale_ptr", "v_scale_ptr"}
FLOATS = {"eps", "logit_factor", "cap_log2"}
# Absent arguments are constants too.
NO_SCALES = dict.fromkeys(SCALE_POINTERS)
CACHE_TYPES = {"auto": "*bf16", "int8": "*i8", "fp8": "*u8", "int4": "*u8"}


def cases(bad: bool) -> list[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """Name, kernel, constants and launch options, with sizes of common models."""
    block, warps = row_tile(4096)
    out = [
        ("rms_norm", rms_norm_kernel, {"BLOCK": block}, {"num_warps": warps}),
        ("add_rms_norm", add_rms_norm_kernel, {"BLOCK": block}, {"num_warps": warps}),
    ]
    for name, is_gelu in (("silu_mul", False), ("gelu_mul", True)):
        constants = {"GELU": is_gelu, "BLOCK": ACTIVATION_BLOCK}
        out.append((name, gated_activation_kernel, constants, {"num_warps": 4}))
    for format in CACHE_TYPES:
        constants = {
            "FORMAT": format,
            "HEAD_DIM": 128,
            "CHANNELS": 128,
            "ROTARY_HALF": 64,
            "ROTARY_LANES": 64,
            "Q_HEADS": 16,
            "KV_HEADS": rotary_tile(8, 128),
            **(NO_SCALES if format == "auto" else {}),
        }
        out.append((f"rotary_kv_write {format}", rotary_kv_write_kernel, constants, {"num_warps": 4}))
    for format, head_dims in (
        ("auto", (64, 80, 128, 256)),
        ("int8", (64, 128)),
        ("fp8", (64, 128)),
        ("int4", (64, 128)),
    ):
        for head_dim in head_dims:
            out += attention_cases(format, head_dim, bad)
    constants = {"HEAD_DIM": 256, "CHANNELS": 256, "GROUP": 4, "TILE_ROWS": 16}
    out.append(("combine 256", combine_kernel, constants, {"num_warps": 4}))
    return [case for case in out if case[0] == "attention prefill 256 auto"] if bad else out


def attention_cases(
    format: CacheFormat, head_dim: int, bad: bool
) -> list[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """Decode with sinks and logsumexp, prefill with a window and a soft cap."""
    out = []
    tiles = attention_tiles(head_dim, format, 2)
    for name, tile in (("decode", tiles.decode), ("prefill", tiles.prefill)):
        constants = {
            "FORMAT": format,
            "HEAD_DIM": head_dim,
            "CHANNELS": triton.next_power_of_2(head_dim // 2 if format == "int4" else head_dim),
            "GROUP": 4,
            "TILE_ROWS": tile.min_tile_rows,
            "BLOCK_SIZE": 16,
            "BLOCK_N": tile.block_n,
            "CHUNK": tile.chunk,
            "UPCAST": False,
            **(NO_SCALES if format == "auto" else {}),
            **dict.fromkeys(("cap_log2", "window") if name == "decode" else ("sinks_ptr", "lse_ptr")),
        }
        options = {"num_warps": 1 if bad else tile.num_warps, "num_stages": tile.num_stages}
        out.append((f"attention {name} {head_dim} {format}", attention_kernel, constants, options))
    return out


def argument_type(name: str, format: CacheFormat) -> str:
    """Triton's name for the type of a kernel argument."""
    if name in CACHE_POINTERS:
        return CACHE_TYPES[format]
    if name in SCALE_POINTERS:
        return "*fp16"
    if name in INDEX_POINTERS:
        return "*i32"
    if name in FLOAT_POINTERS:
        return "*fp32"
    if name in LONG_POINTERS:
        return "*i64"
    if name in FLOATS:
        return "fp32"
    return "*bf16" if name.endswith("_ptr") else "i32"


def compile_kernel(kernel: Any, constants: dict[str, Any], options: dict[str, int], capability: int) -> Any:
    """What a launch would build: 16-byte-aligned pointers, integers that are multiples of 16."""
    names = kernel.arg_names
    format = constants.get("FORMAT", "auto")
    signature = {name: "constexpr" if name in constants else argument_type(name, format) for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith(("*", "i")) and name != "window"
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def report(compiled: Any, capability: int) -> dict[str, int]:
    """Registers and spilled bytes, from the ptxas that triton itself uses for this target."""
    ptx = compiled.asm["ptx"]
    arch = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert arch is not None, "PTX without a target"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name={arch[1]}",
            source,
            "-o",
            f"{folder}/kernel.cubin",
        ]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spilled, log
    assert registers, log
    return {
        "registers": int(registers[1]),
        "spilled": sum(map(int, spilled)),
        "shared": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[capability],
    }


def main(bad: bool) -> None:
    for name, kernel, constants, options in cases(bad):
        for capability in [80] if bad else SHARED_LIMIT:
            compiled = compile_kernel(kernel, constants, options, capability)
            print(json.dumps({"kernel": name, "sm": capability, **report(compiled, capability)}), flush=True)


if __name__ == "__main__":
    main("--bad" in sys.argv)

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

from kvshard.kernels.tiles import (
    ACTIVATION_BLOCK,
    SAMPLING_BLOCK,
    SAMPLING_COLUMNS,
    attention_tiles,
    row_tile,
)
from kvshard.kernels.triton.activation import silu_mul_kernel
from kvshard.kernels.triton.attention import attention_kernel, combine_kernel
from kvshard.kernels.triton.kv_write import kv_write_kernel
from kvshard.kernels.triton.norm import add_rms_norm_kernel, rms_norm_kernel
from kvshard.kernels.triton.rotary import rotary_kernel
from kvshard.kernels.triton.sampling import argmax_kernel, best_kernel, histogram_kernel, mass_kernel

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
FLOAT_POINTERS = {"partial_out_ptr", "partial_lse_ptr", "cos_sin_ptr"}
LONG_POINTERS = {"positions_ptr", "slot_mapping_ptr"}
# Of the sampler's kernels.
FLOAT_POINTERS |= {"logits_ptr", "temperature_ptr", "cut_ptr", "max_logits_ptr", "best_ptr"}
LONG_POINTERS |= {"seeds_ptr", "packed_ptr", "column_ptr", "mass_ptr", "prefix_ptr", "histogram_ptr"}
BYTE_POINTERS = {"sampled_ptr"}
FLOATS = {"eps", "scale_log2"}


def cases(bad: bool) -> list[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """Name, kernel, constants and launch options, with sizes of common models."""
    block, warps = row_tile(4096)
    out = [
        ("rms_norm", rms_norm_kernel, {"BLOCK": block}, {"num_warps": warps}),
        ("add_rms_norm", add_rms_norm_kernel, {"BLOCK": block}, {"num_warps": warps}),
        ("rotary", rotary_kernel, {"Q_HEADS": 32, "KV_HEADS": 8, "HALF": 64}, {"num_warps": 4}),
        ("kv_write", kv_write_kernel, {"HEADS": 8, "CHANNELS": 128}, {"num_warps": 4}),
        ("silu_mul", silu_mul_kernel, {"BLOCK": ACTIVATION_BLOCK}, {"num_warps": 4}),
    ]
    for head_dim in (64, 80, 128, 256):
        channels, group = triton.next_power_of_2(head_dim), 4
        tiles = attention_tiles(head_dim, 2)
        for name, tile in (("decode", tiles.decode), ("prefill", tiles.prefill)):
            constants = {
                "HEAD_DIM": head_dim,
                "CHANNELS": channels,
                "GROUP": group,
                "TILE_ROWS": tile.min_tile_rows,
                "BLOCK_N": tile.block_n,
                "CHUNK": tile.chunk,
                "WINDOWED": name == "prefill",
                "UPCAST": False,
            }
            options = {"num_warps": 1 if bad else tile.num_warps, "num_stages": tile.num_stages}
            out.append((f"attention {name} {head_dim}", attention_kernel, constants, options))
    constants = {"HEAD_DIM": 256, "CHANNELS": 256, "GROUP": 4, "TILE_ROWS": 16}
    out.append(("combine 256", combine_kernel, constants, {"num_warps": 4}))
    tile = {"BLOCK": SAMPLING_BLOCK, "COLUMNS": SAMPLING_COLUMNS}
    for flag in (False, True):
        out.append((f"argmax noise={flag}", argmax_kernel, {"NOISE": flag, **tile}, {"num_warps": 4}))
        out.append((f"histogram mass={flag}", histogram_kernel, {"MASS": flag, **tile}, {"num_warps": 4}))
    out.append(("best", best_kernel, {"RANGES": 32}, {"num_warps": 1}))
    out.append(("mass", mass_kernel, tile, {"num_warps": 4}))
    return [case for case in out if case[0].startswith("attention prefill 256")] if bad else out


def argument_type(name: str) -> str:
    """Triton's name for the type of a kernel argument."""
    if name in INDEX_POINTERS:
        return "*i32"
    if name in FLOAT_POINTERS:
        return "*fp32"
    if name in LONG_POINTERS:
        return "*i64"
    if name in BYTE_POINTERS:
        return "*i8"
    if name in FLOATS:
        return "fp32"
    return "*bf16" if name.endswith("_ptr") else "i32"


def compile_kernel(kernel: Any, constants: dict[str, Any], options: dict[str, int], capability: int) -> Any:
    """What a launch would build: 16-byte-aligned pointers, integers that are multiples of 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else argument_type(name) for name in names}
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

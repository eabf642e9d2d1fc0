"""Compiles the kernels of the typical calls for one target: `python -m kvshard.kernels.compiled.worker TARGET ...`.

A process of its own, without TRITON_INTERPRET: kernels imported under that variable cannot be compiled. No GPU and no
driver is needed: the calls run on CPU tensors, and in place of each launch stands a compilation for the types,
constants and alignments that the launch would have had. Prints a JSON line per kernel; see `report`.
"""

import importlib
import io
import json
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .report import NO_SUCH_CALL, TARGETS

# Products by a warp, by four (sm_90) and by one thread for all (sm_100).
_PTX_TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
# 16 bytes or more into registers, or asynchronously into shared memory.
_PTX_WIDE_LOAD = re.compile(
    r"\bld\.global\S*\.(?:v4\.\w32|v8\.\w32|v2\.\w64|v4\.\w64)\b|\bcp\.async\.cg\b|\bcp\.async\.ca\b.*, 0x10,"
    r"|\bcp\.async\.bulk\b"
)
_AMD_TENSOR_CORE = re.compile(r"\bv_mfma_")
_AMD_WIDE_LOAD = re.compile(r"\b(?:global|buffer)_load_dwordx4\b")


class _AbsentDriver:
    """What triton asks of a driver before a launch."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiler:
    """Stands in for launches while a call runs, and keeps what they compiled to."""

    def __init__(self, target: GPUTarget) -> None:
        driver.set_active(_AbsentDriver(target))
        self._run = JITFunction.run
        self._seen: set[str] = set()
        self.new: list[tuple[str, Any, str]] = []  # kernel's name, compiled kernel, log of the assembler
        compiler = self

        def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            log = io.StringIO()
            with redirect_stdout(log):  # triton prints the log where TRITON_DUMP_PTXAS_LOG is set
                compiled = compiler._run(kernel, *args, grid=grid, warmup=True, **kwargs)
            if compiled.hash not in compiler._seen:
                compiler._seen.add(compiled.hash)
                compiler.new.append((kernel.__name__, compiled, log.getvalue()))

        JITFunction.run = compile_only


def nvidia_figures(compiled: Any, log: str) -> dict[str, int]:
    """From ptxas's log and the PTX. Spills are in bytes, stored and loaded."""
    ptx = compiled.asm["ptx"]
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "stack": _number(r"(\d+) bytes stack frame", log),
        "spilled": _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        "tensor_core": len(_PTX_TENSOR_CORE.findall(ptx)),
        "wide_loads": len(_PTX_WIDE_LOAD.findall(ptx)),
    }


def amd_figures(compiled: Any) -> dict[str, int]:
    """From the assembly's metadata. A spilled register is 4 bytes, stored and loaded."""
    text = compiled.asm["amdgcn"]
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        "spilled": 8 * _number(r"\.vgpr_spill_count:\s+(\d+)", text),
        "tensor_core": len(_AMD_TENSOR_CORE.findall(text)),
        "wide_loads": len(_AMD_WIDE_LOAD.findall(text)),
    }


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in:\n{text[-2000:]}"
    return int(match[1])


def reports(target_name: str, module: str, only: str) -> Iterator[dict[str, Any]]:
    """One record per kernel that the calls launch and no earlier call did, or per call that does not compile."""
    target = TARGETS[target_name]
    compiler = _Compiler(GPUTarget(target.backend, target.arch, target.warp_size))
    calls = list(importlib.import_module(module).typical_calls())
    chosen = [call for call in calls if only in call.name]
    if not chosen:
        print(
            f"no call has {only!r} in its name; there are {', '.join(call.name for call in calls)}",
            file=sys.stderr,
        )
        sys.exit(NO_SUCH_CALL)
    for call in chosen:
        found = {"target": target_name, "call": call.name}
        try:
            call.run()
        except Exception:  # noqa: BLE001 - whatever a compiler says is a result
            yield found | {"error": traceback.format_exc()}
        for kernel, compiled, log in compiler.new:
            figures = nvidia_figures(compiled, log) if target.backend == "cuda" else amd_figures(compiled)
            rest = {
                "kernel": kernel,
                "shared": compiled.metadata.shared,
                "wants_tensor_core": "tt.dot" in compiled.asm["ttir"],
                "wants_wide_loads": kernel not in call.narrow,
            }
            yield found | figures | rest
        compiler.new.clear()


if __name__ == "__main__":
    for record in reports(*sys.argv[1:]):
        print(json.dumps(record), flush=True)

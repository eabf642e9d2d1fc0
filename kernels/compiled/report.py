"""Registers, spills, shared memory and instructions of every kernel on every target, and what is wrong with them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

CALLS = "kvshard.kernels.compiled.calls"
NO_SUCH_CALL = 3  # exit code of a worker


class CompilerMissing(RuntimeError):
    """Triton, or the assembler that comes with it, is not installed here."""


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and the bytes of shared memory that one block may use there.

    is_tuned: the tiles were chosen for it, so that spills and narrow loads are faults.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    is_tuned: bool = True


# Limits: CUDA programming guide, table of technical limits (1 KiB a block is the system's); 64 KiB of LDS on CDNA 3.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912),
    "sm_89": Target("cuda", 89, 32, 101376),
    "sm_90": Target("cuda", 90, 32, 232448),
    "sm_100": Target("cuda", 100, 32, 232448),
    "gfx942": Target("hip", "gfx942", 64, 65536, is_tuned=False),
}
GATED = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class KernelReport:
    """One kernel as one target's compiler made it, or why it could not.

    registers, stack, spilled   per thread; the last two in bytes
    shared                      bytes per block
    tensor_core, wide_loads     tensor-core instructions and loads of 16 bytes or more, in the program text
    wants_tensor_core           it multiplies matrices
    wants_wide_loads            it reads rows
    """

    target: str
    call: str
    kernel: str = ""
    registers: int = 0
    stack: int = 0
    spilled: int = 0
    shared: int = 0
    tensor_core: int = 0
    wide_loads: int = 0
    wants_tensor_core: bool = False
    wants_wide_loads: bool = False
    error: str = ""

    @property
    def faults(self) -> list[str]:
        """What a kernel must not do; empty if all is well."""
        if self.error:
            return [f"does not compile: {self.error.strip().splitlines()[-1]}"]
        target, found = TARGETS[self.target], []
        if self.shared > target.shared_limit:
            found.append(f"needs {self.shared} bytes of shared memory, a block has {target.shared_limit}")
        if not target.is_tuned:
            return found
        if self.spilled:
            found.append(f"spills {self.spilled} bytes a thread")
        if self.wants_tensor_core and not self.tensor_core:
            found.append("multiplies matrices without tensor-core instructions")
        if self.wants_wide_loads and not self.wide_loads:
            found.append("has no 16-byte loads")
        return found


def compile_kernels(
    folder: Path, targets: Sequence[str] = GATED, only: str = "", calls: str = CALLS
) -> list[KernelReport]:
    """Compiles the kernels of the typical calls whose names contain `only`, a process per target, one a processor.

    folder: for compiled files, which are not used again. calls: the module with `typical_calls`.
    Raises CompilerMissing where there is no compiler, ValueError where no call has such a name.
    """
    check_compilers(targets)

    def run(target: str) -> list[KernelReport]:
        return _run_worker(folder / target, target, calls, only)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return [report for reports in pool.map(run, targets) for report in reports]


def check_compilers(targets: Sequence[str]) -> None:
    """Raises CompilerMissing. Imports nothing of triton, which may be told to interpret in this process."""
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        raise CompilerMissing("triton, which compiles the GPU kernels, is not installed: pip install triton")
    own = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    ptxas = os.environ.get("TRITON_PTXAS_PATH", str(own))
    if any(TARGETS[name].backend == "cuda" for name in targets) and not os.access(ptxas, os.X_OK):
        raise CompilerMissing(
            f"ptxas, which triton assembles with, is not at {ptxas}; TRITON_PTXAS_PATH can name another one"
        )


def _run_worker(folder: Path, target: str, calls: str, only: str) -> list[KernelReport]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(sys.path),  # it imports what this process would
        "TRITON_CACHE_DIR": str(folder),
        "TRITON_DEFAULT_FP_FUSION": "1",  # the default of some versions, and not of others
        "TRITON_DUMP_PTXAS_LOG": "1",
    }
    # -P: and nothing from the working directory, which may have a folder called triton.
    command = [sys.executable, "-P", "-m", "kvshard.kernels.compiled.worker", target, calls, only]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == NO_SUCH_CALL:
        raise ValueError(done.stderr.strip())
    reports = [KernelReport(**json.loads(line)) for line in done.stdout.splitlines()]
    if done.returncode:
        end = f"the compiler's process ended with {done.returncode}:\n{done.stderr}"
        reports.append(KernelReport(target=target, call=only or "all", error=end))
    return reports

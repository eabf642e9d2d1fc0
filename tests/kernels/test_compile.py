"""Every Triton kernel, compiled with no GPU: no spills, shared memory within limits, the instructions one hopes for."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from kvshard.kernels.compiled import report
from kvshard.kernels.compiled.report import GATED, CompilerMissing, KernelReport, compile_kernels

pytest.importorskip("triton")

KERNELS = Path(report.__file__).parent.parent / "triton"


@pytest.fixture(
    scope="module",
    params=[pytest.param(target, marks=() if target == "sm_90" else pytest.mark.slow) for target in GATED],
)
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[KernelReport]:
    """The gate of a target, once."""
    return compile_kernels(tmp_path_factory.mktemp("compiled"), [request.param])


def test_every_kernel_is_well_made(reports: list[KernelReport]) -> None:
    assert {(r.kernel, r.call): r.faults for r in reports if r.faults} == {}


def launched_kernels(sources: list[str]) -> set[str]:
    """Names of the functions under @triton.jit that the sources launch, as `name[grid](...)`."""
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    jitted = {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
    }
    subscripted = [
        node.func.value
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    return jitted & {ast.unparse(name) for name in subscripted}


def test_no_kernel_is_left_out(reports: list[KernelReport]) -> None:
    launched = launched_kernels([path.read_text(encoding="utf-8") for path in KERNELS.glob("*.py")])
    assert len(launched) > 5
    assert {r.kernel for r in reports} == launched


def test_launches_are_found() -> None:
    source = """
@triton.jit
def helper(): ...
@triton.jit(do_not_specialize=["n"])
def kernel(): helper()
def host(): kernel[(1,)](table[0](2))
"""
    assert launched_kernels([source]) == {"kernel"}


def test_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels made badly on purpose: each must show its fault, and only that."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    found = {r.call: r for r in compile_kernels(tmp_path, ["sm_80"], calls="planted_calls")}
    expected = {
        "well-made": None,
        "tile": "spills",
        "stages": "bytes of shared memory, a block has 166912",
        "scalar": "without tensor-core instructions",
        "loads": "no 16-byte loads",
        "allowed": None,
        "broken": "does not compile: .*this kernel never compiles",
    }
    assert list(found) == list(expected)
    for call, fault in expected.items():
        faults = found[call].faults
        assert [bool(re.search(fault or "", f)) for f in faults] == [True] * (fault is not None), faults


def test_a_missing_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "ptxas"))
    with pytest.raises(CompilerMissing, match=r"ptxas, .* is not at .*ptxas; TRITON_PTXAS_PATH"):
        compile_kernels(tmp_path, ["sm_90"])
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(CompilerMissing, match="pip install triton"):
        compile_kernels(tmp_path, ["gfx942"])


def test_an_unknown_call_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no call has 'nothing' in its name; there are rms_norm 576, "):
        compile_kernels(tmp_path, ["sm_90"], only="nothing")

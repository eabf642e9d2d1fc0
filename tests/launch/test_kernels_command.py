"""`kvshard kernels`: one small kernel compiled through the command, and what it says when something is wrong."""

import re
from typing import Any

import pytest
from typer.testing import CliRunner

from kvshard.kernels.compiled.report import CompilerMissing, KernelReport
from kvshard.launch import kernels_command
from kvshard.launch.cli import app

SPILLING = KernelReport(
    "sm_90", "attention decode 64", "attention_kernel", registers=255, spilled=64, wide_loads=4
)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["kernels", *arguments], env={"COLUMNS": "120"})


def test_a_kernel_is_compiled_and_shown() -> None:
    pytest.importorskip("triton")
    result = invoke("--target", "sm_90", "--only", "silu")
    assert result.exit_code == 0, result.output
    assert "sm_90, 232,448 bytes of shared memory a block" in result.stdout
    row = re.search(r"silu_mul 14336: gated_activation +(\d+) +(\d+) +(\d+) +0% +(\d+) +(\d+)", result.stdout)
    assert row is not None, result.stdout
    registers, spilled, shared, tensor_core, wide_loads = map(int, row.groups())
    assert registers > 8
    assert (spilled, shared, tensor_core) == (0, 0, 0)
    assert wide_loads > 0


def test_a_fault_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = KernelReport("sm_90", "rms_norm 576", "rms_norm_kernel", registers=32, wide_loads=4)
    monkeypatch.setattr(kernels_command, "compile_kernels", lambda *_: [fine, SPILLING])
    result = invoke("--target", "sm_90")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == (
        "1 of 2 kernels are faulty, first attention_kernel of attention decode 64 on sm_90: spills 64 bytes a thread"
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--target", "sm_9"], None, "--target sm_9: expected one of sm_80, "),
        ([], CompilerMissing("triton is not installed"), "triton is not installed"),
        (["--only", "x"], ValueError("no call has 'x' in its name"), "--only x: no call has 'x' in its name"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: Exception | None, message: str
) -> None:
    def fail(*_: object) -> list[KernelReport]:
        assert error is not None
        raise error

    monkeypatch.setattr(kernels_command, "compile_kernels", fail)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {message}")
    assert len(result.stderr.splitlines()) == 1

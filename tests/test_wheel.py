"""The built wheel: one name at the top, nothing left out, and every module imports from it alone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("kernels", "parallel", "runtime", "launch")
NOT_COPIED = (".*", "*.egg-info", "__pycache__", "build", "dist", "outputs")
IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys
import kvshard
assert pathlib.Path(kvshard.__file__).parent == pathlib.Path(sys.argv[1]), kvshard.__file__
names = [module.name for module in pkgutil.walk_packages(kvshard.__path__, "kvshard.") if module.name != "kvshard.__main__"]
for name in names:
    importlib.import_module(name)
print("\\n".join(names))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the checkout."""
    source, dist = tmp_path_factory.mktemp("source") / "kvshard", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_COPIED))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=240)
    [built] = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True, timeout=240)
    return target


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"kvshard", "kvshard-0.1.0.dist-info"}
    expected = {
        f"kvshard/{path.relative_to(ROOT)}"
        for folder in CODE
        for pattern in ("*.py", "*.c")
        for path in (ROOT / folder).rglob(pattern)
    }
    expected |= {
        f"kvshard/{path.relative_to(ROOT)}"
        for path in (ROOT / "configs").rglob("*.*")
        if "__pycache__" not in path.parts
    }
    expected |= {"kvshard/__init__.py", "kvshard/__main__.py", "kvshard/py.typed"}
    assert expected - set(names) == set()
    assert not [name for name in names if name.startswith(("kvshard/tests", "kvshard/docs"))]


def test_every_module_imports_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(installed / "kvshard")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    modules = {
        ".".join(("kvshard", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for folder in CODE
        for path in (ROOT / folder).rglob("*.py")
    }
    assert imported >= modules


def test_the_command_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvshard", "--version"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "kvshard 0.1.0"), done.stderr

"""Compiled sources: made once, kept in the user's cache, and not needed."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

import kvshard
import kvshard.parallel.shared_memory as ring
from kvshard.kernels import ops
from kvshard.kernels.cpu import library
from kvshard.kernels.native import NotCompiledError, load_library

ROOT = Path(kvshard.__file__).parent
SOURCE = Path(ring.__file__).with_name("shared_memory.c")


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_library(SOURCE) is not None
    (library,) = (tmp_path / "kvshard").iterdir()
    made = library.stat().st_mtime_ns
    assert load_library(SOURCE) is not None
    assert [p.stat().st_mtime_ns for p in (tmp_path / "kvshard").iterdir()] == [made]
    assert (tmp_path / "kvshard").stat().st_mode & 0o077 == 0


def test_all_c_of_the_operations_is_loaded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a shard does before it says that it is ready; a step would wait for the compiler otherwise."""
    library.load.cache_clear()
    ops.load("cpu")
    monkeypatch.setattr(library, "load_library", None)  # nothing more may be opened
    sources = {path.name for path in Path(library.__file__).parent.glob("*.c")} - {"pool.c"}
    assert None not in {library.load(name) for name in sources}


def test_a_relative_cache_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the XDG rules have it; else each working directory would get a library of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_library(SOURCE) is not None
    assert list((tmp_path / "work").iterdir()) == []
    assert len(list((tmp_path / ".cache/kvshard").iterdir())) == 1


def test_no_compiler_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotCompiledError, match="there is no compiler"):
        load_library(SOURCE)


def test_a_compiler_that_fails_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compilers = tmp_path / "bin"
    compilers.mkdir()
    for name in ("cc", "gcc", "clang"):
        (compilers / name).write_text(
            "#!/bin/sh\n[ $1 = --version ] && exit\necho x.c:1: error: no >&2\nexit 1\n"
        )
        (compilers / name).chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{compilers}:/usr/bin:/bin")
    with pytest.raises(NotCompiledError, match=r"x\.c:1: error: no"):
        load_library(SOURCE)
    assert not list((tmp_path / "cache" / "kvshard").iterdir())


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(NotCompiledError, match="Not a directory"):
        load_library(SOURCE)


def test_a_second_compiler_is_asked_where_the_first_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert load_library(SOURCE) is not None


def test_why_the_c_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    library._pool.cache_clear()
    library.load.cache_clear()
    with pytest.warns(UserWarning, match=r"tape\.c could not be compiled.*there is no compiler"):
        assert library.load("tape.c") is None
    library.load.cache_clear()


def _processors() -> tuple[str, ...]:
    """This one, and others of its kind: each compiles other parts of a source."""
    if platform.machine() == "x86_64":
        return ("native", "x86-64-v2", "haswell", "skylake-avx512", "sapphirerapids")
    return ("native",)


@pytest.mark.parametrize("processor", _processors())
@pytest.mark.parametrize(
    "source", [*ROOT.glob("kernels/**/*.c"), *ROOT.glob("parallel/*.c")], ids=lambda path: path.name
)
def test_every_source_compiles_without_a_warning(source: Path, processor: str, tmp_path: Path) -> None:
    """A source that does not compile would only be slow, as there is torch in its place."""
    asked = ["cc", f"-march={processor}", "-E", "-x", "c", "/dev/null"]
    if subprocess.run(asked, capture_output=True, timeout=60, check=False).returncode != 0:
        pytest.skip(f"the compiler does not know {processor}")
    flags = [
        "-std=gnu11",
        "-O1",
        f"-march={processor}",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
        "-Wno-unused-parameter",
    ]
    command = ["cc", *flags, "-shared", "-fPIC", str(source), "-o", str(tmp_path / "out.so"), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr

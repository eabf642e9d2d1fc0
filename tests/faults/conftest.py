"""What the jobs that are killed here have in common."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_job import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def temp() -> Iterator[Path]:
    """A TMPDIR of a job's own; short, since socket paths are limited."""
    folder = Path(tempfile.mkdtemp(prefix="kv-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)

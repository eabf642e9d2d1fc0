"""The simulated shards, for every test here."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load() -> ModuleType:
    path = Path(__file__).parent / "fake_executor.py"
    spec = importlib.util.spec_from_file_location("kvshard_test_fake_executor", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_FAKE = _load()


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """The module fake_executor: expected, make_limits, make_request, Run."""
    return _FAKE

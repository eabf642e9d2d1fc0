"""The engine without a model in the real one's place."""

import sys

import pytest

from ..runtime.batch.fakes import fake_engine_module


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvshard.launch.engine", fake_engine_module())

"""Checks before any test runs."""

import os
from pathlib import Path

import pytest
import torch
from feature_table import FeatureTable

import kvshard

if not torch.cuda.is_available():
    # Read when triton is first imported, which transformers does too.
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["models_factory", "pytester"]  # the `demo_model` fixture; pytest's own for tests of tests

# A copy installed elsewhere would let every test pass without reading this checkout.
_CHECKOUT = Path(__file__).resolve().parent.parent
assert Path(kvshard.__file__).resolve().parent == _CHECKOUT, (
    f"kvshard is imported from {kvshard.__file__} and not from {_CHECKOUT}; run `make setup` in this checkout"
)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(FeatureTable(config, _CHECKOUT / "docs" / "features.md"))

"""Checks before any test runs."""

from pathlib import Path

import kvshard

# A copy installed elsewhere would let every test pass without reading this checkout.
_CHECKOUT = Path(__file__).resolve().parent.parent
assert Path(kvshard.__file__).resolve().parent == _CHECKOUT, (
    f"kvshard is imported from {kvshard.__file__} and not from {_CHECKOUT}; run `make setup` in this checkout"
)

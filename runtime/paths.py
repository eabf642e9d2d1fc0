"""Where kvshard keeps files of its own on this machine."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`kvshard` in the user's cache folder: XDG_CACHE_HOME, else ~/.cache. It may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "kvshard"

"""kvshard: tensor-parallel batch generation, sharded by attention heads.

The public names are loaded on first use, so that `import kvshard` stays cheap
and needs no torch.
"""

from typing import Any

_PUBLIC = {
    "LLM": "kvshard.launch.llm",
    "SamplingParams": "kvshard.runtime.sampling_params",
    "JobConfig": "kvshard.runtime.config",
}

__all__ = ["LLM", "JobConfig", "SamplingParams", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kvshard' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)

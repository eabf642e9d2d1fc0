"""An engine in a process of its own (engine.py), and the model in the form that it reads (convert.py)."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import IO, Any

from kvshard.runtime.models.resolve import fetch_demo

from .known import Chosen

HERE = Path(__file__).parent
GGUF_TYPES = {"bfloat16": "bf16", "float32": "f32"}
CONVERT_S, LOAD_S, SAMPLE_S = 300, 600, 1200


class PeerEnded(Exception):
    """An engine's process has ended, or took too long and was ended."""


class Peer:
    """An engine's process. `version` and `load_s` are what it said when it was ready."""

    def __init__(
        self, chosen: Chosen, python: str, model: str, dtype: str, threads: int, log: IO[str]
    ) -> None:
        self.chosen, self.name = chosen, chosen.name
        settings = {"dtype": dtype, "threads": threads, "size": chosen.size, "weights": chosen.weights}
        self._process = subprocess.Popen(
            [python, str(HERE / "engine.py"), chosen.kind, model, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            ready = self._answer(LOAD_S)
        except BaseException:
            self.close()
            raise
        self.version: str = ready["version"]
        self.load_s: float = ready["load_s"]

    def sample(self, workload: str, repeat: int, token_ids: bool = False) -> dict[str, Any]:
        """What engine.py answers. Raises PeerEnded."""
        assert self._process.stdin is not None
        request = {"workload": workload, "repeat": repeat, "token_ids": token_ids}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerEnded(f"{self.name} ended with {self._process.wait()}; the log says why") from None
        return self._answer(SAMPLE_S)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        watch = threading.Timer(timeout_s, self._process.kill)
        watch.daemon = True
        watch.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
        if not line:
            raise PeerEnded(f"{self.name} ended with {self._process.wait()}; the log says why")
        answer: dict[str, Any] = json.loads(line)
        return answer


def model_for(chosen: Chosen, python: str, model: Path, dtype: str, folder: Path, log: IO[str]) -> str:
    """The model as that engine reads it: the Hugging Face directory `model`, or what is made of it in `folder`. For
    llama.cpp always the demo model. Raises PeerEnded."""

    def convert(source: Path, target: Path, *settings: str) -> Path:
        if not target.exists():
            command = [python, str(HERE / "convert.py"), chosen.kind, str(source), str(target), *settings]
            try:
                subprocess.run(command, stdout=log, stderr=log, timeout=CONVERT_S, check=True)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                raise PeerEnded(
                    f"{chosen.name}: its model cannot be made ({error}); the log says why"
                ) from None
        return target

    if chosen.kind == "ctranslate2":
        return str(convert(model, folder / "ctranslate2"))
    if chosen.kind != "llamacpp":
        return str(model)
    gguf = fetch_demo()
    if chosen.weights == "q4_1":  # as the model's package has it
        return str(gguf)
    rounded = convert(gguf, folder / "bf16.gguf", "bf16")  # so that all other types hold what `model` holds
    wanted = chosen.weights or GGUF_TYPES[dtype]
    return str(rounded if wanted == "bf16" else convert(rounded, folder / f"{wanted}.gguf", wanted))

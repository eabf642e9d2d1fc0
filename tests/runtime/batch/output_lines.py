"""Lines and settings of output files, for their tests."""

import json
from pathlib import Path
from typing import Any

from kvshard.runtime.batch.response import error_line
from kvshard.runtime.config import JobConfig, parse_config

CONFIG = parse_config({"model": "m"}, "test")


def ok_line(row_id: str) -> bytes:
    line = {"id": "batch_req_1", "custom_id": row_id, "response": {"status_code": 200}, "error": None}
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


INPUT_ERROR = error_line("bad", "input_error", "invalid_line", "no prompt")
SYSTEM_ERROR = error_line("lost", "system_error", "request_failed", "lost")


def config(**values: Any) -> JobConfig:
    return parse_config({"model": "m", **values}, "test")


def ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()]

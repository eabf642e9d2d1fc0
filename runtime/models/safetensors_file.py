"""The header of a safetensors file: an 8-byte length, a JSON object, then the tensors' bytes.

Format: https://github.com/huggingface/safetensors#format. Parsed here, not by the safetensors package, because shards
read by byte offset and because a damaged header must say what is wrong with it.
"""

import json
import math
from pathlib import Path
from typing import Any

from .fields import CheckpointError
from .tensor_info import TensorInfo

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one file. Raises CheckpointError if the header is corrupt or the file is cut short."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise CheckpointError(
                f"{path}: corrupt safetensors header: it claims {header_bytes} bytes, the file has {file_bytes}; "
                "fetch the file again"
            )
        text = file.read(header_bytes)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: corrupt safetensors header: not JSON ({error}); fetch the file again"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: corrupt safetensors header: not a JSON object")
    return [
        _tensor(path, name, entry, 8 + header_bytes, file_bytes)
        for name, entry in header.items()
        if name != "__metadata__"
    ]


def _tensor(path: Path, name: str, entry: Any, data_start: int, file_bytes: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sane = all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: corrupt safetensors header: entry of tensor {name}") from error
    if dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{path}: tensor {name} has dtype {dtype}, which is not supported; supported: "
            f"{', '.join(ITEM_BYTES)}"
        )
    if not sane or not shape or end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{path}: corrupt safetensors header: tensor {name} has shape {list(shape)} of {dtype} "
            f"but bytes {begin} to {end}"
        )
    if data_start + end > file_bytes:
        raise CheckpointError(
            f"{path}: file is cut short: tensor {name} ends at byte {data_start + end}, "
            f"the file has {file_bytes}; fetch it again"
        )
    return TensorInfo(name, shape, dtype, path.name, data_start + begin)

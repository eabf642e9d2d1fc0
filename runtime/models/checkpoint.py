"""Reading slices of tensors from disk: only the rows or column blocks asked for, dequantised where needed."""

import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ...kernels.weight_codes import WeightCodes
from .checkpoint_index import CheckpointIndex, read_index
from .ggml_blocks import Bytes, widen
from .spec import ModelSpec
from .tensor_info import STORED_TYPES, TensorInfo
from .weight_blocks import made, taken
from .weight_formats import BLOCK, BlockFormat

# Stored bytes read at a time: bounds the host memory above the destination. What 4-bit blocks become is eight times as much.
CHUNK_BYTES = 256 << 10
# What the system keeps of a file in one piece, and maps as a whole where one byte of it is touched: at most a large page.
FOLIO_BYTES = 2 << 20


class Checkpoint:
    """Slices of a checkpoint's tensors, for any thread. `bytes_read` counts the stored bytes of all slices read so far.

    Files are memory-mapped while it is open; use it as a context manager to let go of the mapped pages.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._maps: dict[str, mmap.mmap] = {}

    @property
    def spec(self) -> ModelSpec:
        return self.index.spec

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._maps.clear()

    def read(self, name: str, axis: int = 0, indices: range | None = None) -> torch.Tensor:
        """A new tensor with `indices` (default: all) of one axis, in the stored dtype; fp32 for ggml block types."""
        info = self.index.tensors[name]
        shape = list(info.shape)
        shape[axis] = shape[axis] if indices is None else len(indices)
        out = torch.empty(shape, dtype=_torch_dtype(info.dtype))
        self.read_into(out, name, axis, indices)
        return out

    def read_into(self, out: torch.Tensor, name: str, axis: int = 0, indices: range | None = None) -> None:
        """Fill `out`, of any float dtype and on any device, with `indices` of one axis; see `read`.

        Rows of a tensor with `permuted_head_dim` can only be read by whole heads.
        """
        out_rows = out.unsqueeze(1) if out.dim() == 1 else out  # a vector is a matrix of one column
        info, rows, columns = self._slice(out_rows.shape, name, axis, indices)
        for place, data in self._chunks(info, rows, columns):
            out_rows[place].copy_(_unpermuted(_numbers(data, info, columns), info))

    def read_codes(
        self, out: WeightCodes, format: BlockFormat, name: str, axis: int = 0, indices: range | None = None
    ) -> None:
        """Fill `out`, of `format`, with `indices` of one axis of a matrix; columns by whole blocks.

        Blocks that the file has in this format are taken as they are, others are made of the tensor's numbers.
        """
        info, rows, columns = self._slice(out.shape, name, axis, indices)
        assert columns.start % BLOCK == len(columns) % BLOCK == 0, f"{name}: {columns} cuts a block"
        for place, data in self._chunks(info, rows, columns):
            parts = (
                taken(data, format) if info.dtype == format else made(_numbers(data, info, columns), format)
            )
            for target, part in zip(out.tensors, parts, strict=True):
                target[place].copy_(_unpermuted(part, info))

    def _slice(
        self, shape: torch.Size, name: str, axis: int, indices: range | None
    ) -> tuple[TensorInfo, range, range]:
        """A tensor's record, and the rows and columns that `indices` of one axis mean: a matrix of this shape."""
        info = self.index.tensors[name]
        wanted = range(info.shape[axis]) if indices is None else indices
        assert 0 <= wanted.start <= wanted.stop <= info.shape[axis], f"{name}: {wanted}"
        num_columns = info.shape[1] if len(info.shape) == 2 else 1
        rows = wanted if axis == 0 else range(info.num_rows)
        columns = range(num_columns) if axis == 0 else wanted
        assert shape == (len(rows), len(columns)), f"{name}: {tuple(shape)} for {wanted}"
        return info, rows, columns

    def _chunks(self, info: TensorInfo, rows: range, columns: range) -> Iterator[tuple[slice, Bytes]]:
        """Where in `rows` a chunk lies, and the stored bytes of its columns' blocks, [rows in chunk, bytes], in order.

        Each holds at most CHUNK_BYTES, or one head where that is more.
        """
        if not (rows and columns):
            return
        block, block_bytes = STORED_TYPES[info.dtype]
        first_block, last_block = columns.start // block, -(-columns.stop // block)
        head_dim = info.permuted_head_dim or 1
        assert rows.start % head_dim == len(rows) % head_dim == 0, f"{info.name}: {rows} cuts a head"
        chunk_rows = max(1, CHUNK_BYTES // ((last_block - first_block) * block_bytes * head_dim)) * head_dim
        stored = self._stored(info)
        for start in range(rows.start, rows.stop, chunk_rows):
            chunk = range(start, min(start + chunk_rows, rows.stop))
            data = stored[
                chunk.start : chunk.stop, first_block * block_bytes : last_block * block_bytes
            ].copy()
            with self._lock:
                self.bytes_read += data.nbytes
            self._let_go(info, chunk)
            yield slice(chunk.start - rows.start, chunk.stop - rows.start), data

    def _stored(self, info: TensorInfo) -> Bytes:
        """The tensor's bytes in the file, [num_rows, row_bytes], not read yet."""
        with self._lock:
            if info.file not in self._maps:
                with (self.index.folder / info.file).open("rb") as file:
                    self._maps[info.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped = self._maps[info.file]
        return np.frombuffer(mapped, np.uint8, info.num_bytes, info.offset).reshape(
            info.num_rows, info.row_bytes
        )

    def _let_go(self, info: TensorInfo, rows: range) -> None:
        """Take the pages that reading these rows has mapped out of this process's memory; the system may keep them."""
        begin, end = (info.offset + row * info.row_bytes for row in (rows.start, rows.stop))
        first = begin // FOLIO_BYTES * FOLIO_BYTES
        mapped = self._maps[info.file]
        last = min(-(-end // FOLIO_BYTES) * FOLIO_BYTES, len(mapped))
        mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a Hugging Face directory or `.gguf` file; raises CheckpointError as `read_index` does."""
    return Checkpoint(read_index(path))


def _torch_dtype(stored: str) -> torch.dtype:
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(stored, torch.float32)


def _numbers(data: Bytes, info: TensorInfo, columns: range) -> torch.Tensor:
    """[rows, bytes] of the blocks that have the columns to [rows, columns]."""
    block = STORED_TYPES[info.dtype][0]
    if block == 1:
        return torch.from_numpy(data).view(_torch_dtype(info.dtype))
    first = columns.start // block * block
    return widen(data, info.dtype)[:, columns.start - first : columns.stop - first]


def _unpermuted(values: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    """Rows of each head from llama.cpp's (i, i + half) pairs back to first half, second half, where they are so."""
    head_dim = info.permuted_head_dim
    if head_dim is None:
        return values
    num_rows, num_columns = values.shape
    pairs = values.reshape(num_rows // head_dim, head_dim // 2, 2, num_columns)
    return pairs.transpose(1, 2).reshape(num_rows, num_columns)

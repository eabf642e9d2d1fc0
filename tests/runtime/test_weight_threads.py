"""The threads that load weights, and the pages of the file that they let go of."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models_factory import make_llama
from safetensors.torch import save_file

from kvshard.parallel.shard_map import ShardMap
from kvshard.runtime.models.checkpoint import CHUNK_BYTES, Checkpoint
from kvshard.runtime.models.checkpoint_index import CheckpointIndex, read_index
from kvshard.runtime.models.tensor_info import TensorInfo
from kvshard.runtime.shard.weights import Weights, load_weights

NUM_THREADS = 3


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    """A number that neither one thread of the loader nor this machine's cores would give by chance."""
    before = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    yield
    torch.set_num_threads(before)


class WatchedCheckpoint(Checkpoint):
    """Notes who reads, with how many of torch's threads; reading `bad` fails."""

    def __init__(self, index: CheckpointIndex, bad: str | None = None) -> None:
        super().__init__(index)
        self.readers: set[tuple[str, int]] = set()
        self._bad = bad

    def read_into(self, out: torch.Tensor, name: str, axis: int = 0, indices: range | None = None) -> None:
        self.readers.add((threading.current_thread().name.rpartition("_")[0], torch.get_num_threads()))
        if name == self._bad:
            raise OSError(5, "Input/output error", name)
        super().read_into(out, name, axis, indices)


def load(checkpoint: Checkpoint) -> Weights:
    spec = checkpoint.spec
    shard = ShardMap.build(spec.dims, 1).shard(0)
    return load_weights(checkpoint, spec, shard, torch.float32, torch.device("cpu"))


def threads_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("load")]


def test_loading_computes_with_one_thread_each_and_leaves_torch_as_it_was(tmp_path: Path) -> None:
    with WatchedCheckpoint(read_index(make_llama(tmp_path))) as checkpoint:
        load(checkpoint)
    assert checkpoint.readers == {("load", 1)}
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (NUM_THREADS, NUM_THREADS)
    assert loader_threads() == []


@pytest.mark.parametrize("bad", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_what_a_loading_thread_raises_reaches_the_caller(bad: str, tmp_path: Path) -> None:
    with (
        WatchedCheckpoint(read_index(make_llama(tmp_path)), bad) as checkpoint,
        pytest.raises(OSError, match=rf"\[Errno 5\] Input/output error: '{bad}'"),
    ):
        load(checkpoint)
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (NUM_THREADS, NUM_THREADS)
    assert loader_threads() == []


def resident_bytes(path: Path) -> int:
    """Of this process's mappings of the file."""
    total = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # the head of a mapping, with its path at the end
            inside = words[-1] == str(path)
        elif inside and words[0] == "Rss:":
            total += int(words[1]) << 10
    return total


@pytest.mark.parametrize(
    ("axis", "indices"),
    [(0, None), (0, range(333, 1901)), (1, range(100, 900))],
    ids=["all", "rows", "columns"],
)
def test_pages_of_the_file_are_let_go_as_they_are_read(
    axis: int, indices: range | None, tmp_path: Path
) -> None:
    """8 MiB are read, and while the file is still mapped less than two chunks of it are in this process's memory.

    Rows of 4,004 bytes: a page that is let go holds the beginning of the next chunk too.
    """
    values = torch.arange(2048 * 1001, dtype=torch.float32).view(2048, 1001)
    path = tmp_path / "model.safetensors"
    save_file({"w": values}, path)
    data_start = path.stat().st_size - values.nbytes
    info = TensorInfo("w", (2048, 1001), "F32", path.name, data_start)
    spec = read_index(make_llama(tmp_path / "other")).spec
    with Checkpoint(CheckpointIndex(tmp_path, spec, {"w": info})) as checkpoint:
        read = checkpoint.read("w", axis, indices)
        assert checkpoint.bytes_read > 8 * CHUNK_BYTES
        assert resident_bytes(path) < 2 * CHUNK_BYTES
        again = checkpoint.read("w", axis, indices)
    wanted = torch.arange(values.shape[axis]) if indices is None else torch.tensor(indices)
    assert torch.equal(read, values.index_select(axis, wanted))
    assert torch.equal(again, read)
    assert resident_bytes(path) == 0

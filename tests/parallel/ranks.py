"""Runs a function as several real processes, one a rank, that meet through a store.

The processes are forked from a server that has imported torch, so they start in milliseconds. They find the function
by its file and name, since pytest's importlib mode leaves test modules off sys.path.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore, Store

from kvshard.parallel.group import Group

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed", "kvshard.runtime.shard.main", "pytest"])
_RANK_MAIN = "rank_main"


class Ranks:
    """The processes of one run. `results` waits for them; leaving the `with` block ends those still there."""

    def __init__(
        self, fn: Callable[..., Any], world_size: int, args: Sequence[Any], timeout_s: float
    ) -> None:
        self.world_size = world_size
        self._deadline = time.monotonic() + timeout_s
        self._directory = tempfile.TemporaryDirectory()
        path = str(Path(self._directory.name) / "store")
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            request = (theirs, fn.__code__.co_filename, fn.__name__, path, rank, world_size, args)
            process = CONTEXT.Process(
                target=runpy.run_path, args=(__file__, {"request": request}, _RANK_MAIN), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._directory.cleanup()

    def results(self) -> list[Any]:
        """What each rank returned; None for one whose process ended without a word. Raises what a rank raised."""
        results: list[Any] = [None] * self.world_size
        open_pipes = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while open_pipes:
            left_s = self._deadline - time.monotonic()
            ready = wait(list(open_pipes), timeout=max(left_s, 0))
            if not ready:
                raise TimeoutError(
                    f"ranks {sorted(open_pipes.values())} of {self.world_size} are not done in time"
                )
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = open_pipes.pop(pipe)
                try:
                    outcome, value = pipe.recv()
                except EOFError:
                    continue
                if outcome == "error":
                    raise AssertionError(f"rank {rank} of {self.world_size} failed:\n{value}")
                results[rank] = value
        return results


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60) -> list[Any]:
    """fn(store, rank, world_size, *args) in `world_size` processes; their results by rank.

    fn must be a function of a module. A rank that ends without a result (killed) gives None.
    """
    with Ranks(fn, world_size, args, timeout_s) as ranks:
        return ranks.results()


def connect(
    store: Store,
    rank: int,
    world_size: int,
    *,
    backend: str = "shared_memory",
    epoch: int = 0,
    timeout_s: float = 30,
    max_bytes: int = 0,
    job_id: str = "test",
) -> Group:
    """A CPU group; "gloo" is had by ranks that say they are on different hosts."""
    group = Group.connect(
        store,
        rank=rank,
        world_size=world_size,
        epoch=epoch,
        job_id=job_id,
        device="cpu",
        host_id=f"host {rank}" if backend == "gloo" else "host",
        timeout_s=timeout_s,
        max_bytes=max_bytes,
        interface="lo" if backend == "gloo" else None,
    )
    expected = "single" if world_size == 1 else backend
    assert group.backend == expected, f"wanted {expected}, got {group.backend}"
    return group


def _main(
    pipe: Connection, file: str, name: str, store_path: str, rank: int, world_size: int, args: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    try:
        package = types.ModuleType("rank_tests")
        package.__path__ = [str(Path(file).parent)]
        sys.modules["rank_tests"] = package
        fn = getattr(importlib.import_module(f"rank_tests.{Path(file).stem}"), name)
        pipe.send(("result", fn(FileStore(store_path, world_size), rank, world_size, *args)))
    except BaseException:  # noqa: BLE001 - the parent raises it
        pipe.send(("error", traceback.format_exc()))
    pipe.close()
    os._exit(0)  # a rank may have left gloo work behind that cannot be cancelled


if __name__ == _RANK_MAIN:
    _main(*globals()["request"])

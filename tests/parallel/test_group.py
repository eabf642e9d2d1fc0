"""Meeting, aborting, dying: what happens to a group when a rank does not do its part."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import Store, TCPStore

from kvshard.parallel import group as group_module
from kvshard.parallel import shared_memory_layout
from kvshard.parallel.group import Group, GroupError

from .ranks import Ranks, connect, run_ranks

BACKENDS = ["shared_memory", "gloo"]
WHERE = "layer 3 o_proj"
PATIENCE_S = 30.0  # the groups' timeout; what must be noticed sooner is asserted to be much sooner
SOON_S = 8.0


def add_one(group: Group) -> float:
    return group.all_reduce(torch.ones(10), WHERE).sum().item() / 10


def error_of(group: Group) -> tuple[GroupError, float]:
    start = time.monotonic()
    with pytest.raises(GroupError) as caught:
        add_one(group)
    return caught.value, time.monotonic() - start


def abort_when_waiting(group: Group, reason: str) -> threading.Thread:
    """From another thread, once the next collective has begun."""
    begun = group._transport.sequence  # type: ignore[union-attr]

    def run() -> None:
        while group._transport.sequence == begun:  # type: ignore[union-attr]
            threading.Event().wait(0.001)
        group.abort(reason)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def abort_and_rebuild(store: Store, rank: int, world_size: int, backend: str) -> list[object]:
    group = connect(store, rank, world_size, backend=backend, timeout_s=PATIENCE_S)
    assert add_one(group) == world_size
    if rank == 0:  # the others never come to this collective, until it is aborted
        thread = abort_when_waiting(group, "the coordinator says stop")
        error, waited_s = error_of(group)
        thread.join(10)
        store.set("aborted", "yes")
    else:
        store.wait(["aborted"])
        if (
            backend == "gloo"
        ):  # what rank 0 had sent before the abort still arrives; the next sum cannot come about
            add_one(group)
        error, waited_s = error_of(group)
    again, _ = error_of(group)
    group.close()
    group.close()
    next_group = connect(store, rank, world_size, backend=backend, epoch=1, timeout_s=PATIENCE_S)
    total = add_one(next_group)
    next_group.barrier("end")
    return [str(error), error.where, error.sequence, error.missing, waited_s, str(again), total]


@pytest.mark.parametrize("backend", BACKENDS)
def test_abort_wakes_all_ranks_and_the_next_epoch_works(backend: str) -> None:
    results = run_ranks(abort_and_rebuild, 3, backend)
    for rank, (text, where, sequence, missing, waited_s, again, total) in enumerate(results):
        assert "the coordinator says stop" in text
        assert (where, missing) == (WHERE, ())
        assert sequence == (3 if backend == "gloo" and rank > 0 else 2)
        assert waited_s < SOON_S
        assert "aborted" in again
        assert total == 3.0


def lose_a_rank(store: Store, rank: int, world_size: int, backend: str) -> list[object]:
    group = connect(store, rank, world_size, backend=backend, timeout_s=PATIENCE_S)
    add_one(group)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    error, waited_s = error_of(group)
    group.close()
    survivors = connect(
        store, 0 if rank == 0 else 1, 2, backend=backend, epoch=1, timeout_s=PATIENCE_S
    )  # one rank fewer
    total = add_one(survivors)
    survivors.barrier("end")
    return [error.missing, error.where, error.sequence, error.rank, waited_s, total]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_rank_is_named_and_the_rest_goes_on(backend: str) -> None:
    first, killed, last = run_ranks(lose_a_rank, 3, backend)
    assert killed is None
    for rank, (missing, where, sequence, reporter, waited_s, total) in ((0, first), (2, last)):
        assert (missing, where, sequence, reporter) == ((1,), WHERE, 2, rank)
        assert waited_s < SOON_S
        assert total == 2.0


def wait_for_a_late_rank(store: Store, rank: int, world_size: int, kind: str) -> object:
    if kind == "python":
        os.environ["PATH"] = ""
    backend = "gloo" if kind == "gloo" else "shared_memory"
    group = connect(store, rank, world_size, backend=backend, timeout_s=2)
    add_one(group)
    if rank == 1:
        store.wait(["0 is done", "2 is done"])  # alive, but not there
        return None
    error, waited_s = error_of(group)
    store.set(f"{rank} is done", "yes")
    return error.missing, str(error), waited_s


@pytest.mark.parametrize("kind", ["native", "python", "gloo"])
def test_a_rank_that_does_not_come_is_named_at_the_deadline(kind: str) -> None:
    results = run_ranks(wait_for_a_late_rank, 3, kind)
    for missing, text, waited_s in (results[0], results[2]):
        assert missing == (1,)
        assert "[1]" in text
        assert WHERE in text
        assert 1.0 < waited_s < SOON_S


def test_ranks_that_never_connect_are_named() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(GroupError, match=r"ranks \[1, 2\] of 3 did not come") as caught:
        connect(store, 0, 3, timeout_s=0.5)
    assert caught.value.missing == (1, 2)


def one_cannot_attach(store: Store, rank: int, world_size: int) -> tuple[str, float]:
    def refuse(*args: object) -> None:
        raise OSError("another namespace")

    if rank == 1:
        shared_memory_layout.attach = refuse  # type: ignore[assignment]
    group = Group.connect(
        store,
        rank=rank,
        world_size=world_size,
        epoch=0,
        job_id="test",
        device="cpu",
        host_id="host",
        timeout_s=PATIENCE_S,
        max_bytes=0,
    )
    total = add_one(group)
    group.barrier("end")
    return group.backend, total


def test_one_rank_that_cannot_attach_moves_all_to_gloo() -> None:
    assert run_ranks(one_cannot_attach, 3) == [("gloo", 3.0)] * 3


def test_a_segment_with_another_nonce_is_refused() -> None:
    segment, descriptor, nonce = shared_memory_layout.create("kvshard test", 2, 4096)
    same = shared_memory_layout.attach(os.getpid(), descriptor, nonce)
    segment.memory[-1] = 7
    assert same.memory[-1] == 7
    with pytest.raises(OSError, match="nonce"):
        shared_memory_layout.attach(os.getpid(), descriptor, "00" * 32)
    os.close(descriptor)
    with pytest.raises(OSError, match=r"No such file|nonce|segment"):
        shared_memory_layout.attach(os.getpid(), descriptor, nonce)


def die_before_all_attached(
    store: Store, rank: int, world_size: int, job_id: str, moment: str
) -> tuple[tuple[int, ...], list[str]]:
    create = shared_memory_layout.create

    def die() -> None:
        assert holders(job_id), "the segment cannot be seen, so this test would prove nothing"
        os.kill(os.getpid(), signal.SIGKILL)

    def create_and_die(*args: Any) -> None:
        made = create(*args)
        die()
        del made

    def publish_and_die(meeting: Any, name: str, ranks: range) -> list[Any]:
        if name == "segment":
            die()
        return take(meeting, name, ranks)

    take = group_module._Meeting.take
    if rank == 0 and moment == "created":
        shared_memory_layout.create = create_and_die  # type: ignore[assignment]
    elif rank == 0:
        group_module._Meeting.take = publish_and_die  # type: ignore[method-assign]
    try:
        connect(store, rank, world_size, job_id=job_id, timeout_s=2)
    except GroupError as error:
        missing = error.missing
    gc.collect()
    return missing, holders(job_id)


def holders(name: str) -> list[str]:
    """Processes that map the memory file or hold it open."""
    return [process.name for process in Path("/proc").glob("[0-9]*") if holds(process, name)]


def holds(process: Path, name: str) -> bool:
    try:
        if name in (process / "maps").read_text():
            return True
        descriptors = list((process / "fd").iterdir())
    except OSError:
        return False  # it has ended meanwhile
    for descriptor in descriptors:
        try:
            if name in os.readlink(descriptor):
                return True
        except OSError:
            continue  # closed meanwhile
    return False


@pytest.mark.parametrize("moment", ["created", "published"])
def test_killed_between_create_and_attach_leaves_nothing(moment: str) -> None:
    job_id = uuid.uuid4().hex
    before = set(os.listdir("/dev/shm"))
    with Ranks(die_before_all_attached, 2, [job_id, moment], timeout_s=40) as ranks:
        killed, survivor = ranks.results()
    assert killed is None
    assert survivor == ((0,), [])
    assert holders(job_id) == []
    assert not [name for name in set(os.listdir("/dev/shm")) - before if job_id in name or "kvshard" in name]


def test_the_error_survives_a_trip_between_processes() -> None:
    error = GroupError("gone", rank=2, where=WHERE, sequence=7, missing=[0, 1])
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "rank 2, layer 3 o_proj, collective 7: gone"
    assert (copy.rank, copy.where, copy.sequence, copy.missing) == (2, WHERE, 7, (0, 1))

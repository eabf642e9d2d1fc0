"""The threads that kernels/cpu shares its work out to: each task once, whoever sleeps, forks or calls."""

from __future__ import annotations

import ctypes
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import kvshard.kernels.cpu
from kvshard.kernels.native import NotCompiledError, load_library

FOLDER = Path(kvshard.kernels.cpu.__file__).parent
DEADLINE_S = 60
_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


@pytest.fixture(scope="module")
def share_out() -> Callable[[Callable[[int, int], None], int, int], None]:
    """share_out(task, count, threads), of tasks that are told their number and their thread's."""
    try:
        pool = load_library(FOLDER / "pool.c", exports=True)
    except NotCompiledError as error:
        pytest.skip(str(error))

    def call(task: Callable[[int, int], None], count: int, threads: int) -> None:
        failed: set[int] = set()

        def run(_: None, i: int, thread: int) -> None:
            failed.add(i)
            task(i, thread)  # ctypes prints what it raises
            failed.remove(i)

        pool.kvshard_share_out(_TASK(run), None, ctypes.c_int64(count), ctypes.c_int64(threads))
        assert not failed, "tasks have failed: see standard error"

    return call


def asleep(thread_id: int) -> bool:
    stat = Path(f"/proc/self/task/{thread_id}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "S"


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "never came true"


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 65_535, 65_536, 70_000])
def test_each_task_is_done_once(share_out, count, threads):
    done: Counter[int] = Counter()
    share_out(lambda i, _: done.update((i,)), count, threads)
    assert done == Counter(range(count))


def test_a_helper_that_sleeps_is_woken_and_one_too_many_is_not_asked(share_out):
    helpers: dict[int, int] = {}

    def meet(count: int) -> None:
        barrier = threading.Barrier(count)

        def task(_: int, thread: int) -> None:
            helpers[thread] = threading.get_native_id()
            barrier.wait(DEADLINE_S)

        share_out(task, count, count)

    meet(4)
    assert sorted(helpers) == [0, 1, 2, 3]
    for _ in range(3):
        wait_until(lambda: all(asleep(helpers[thread]) for thread in (1, 2, 3)))
        before = dict(helpers)
        helpers.clear()
        meet(2)  # only if both are at work at once
        assert helpers == {0: before[0], 1: before[1]}
        helpers.update(before)


def test_a_task_may_share_out_and_so_may_two_callers(share_out):
    done: Counter[int] = Counter()

    def outer(i: int, _: int) -> None:
        share_out(lambda j, _: done.update(((i, j),)), 3, 2)

    callers = [threading.Thread(target=share_out, args=(outer, 20, 2)) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(DEADLINE_S)
    assert done == {(i, j): 2 for i in range(20) for j in range(3)}


def fork(child: Callable[[], None]) -> int | None:
    """The exit code of a forked process that runs `child`."""
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(DEADLINE_S)
    process.kill()
    return process.exitcode


def test_a_forked_process_has_helpers_of_its_own(share_out):
    barrier = threading.Barrier(2)
    share_out(lambda *_: barrier.wait(DEADLINE_S), 2, 2)

    def child() -> None:
        barrier = threading.Barrier(2)
        share_out(lambda *_: barrier.wait(DEADLINE_S / 4), 2, 2)

    assert fork(child) == 0


def test_a_process_forked_within_a_call_has_nothing_to_do_with_it(share_out):
    """The tasks that nobody has claimed yet stay the parent's."""
    done: Counter[int] = Counter()

    def child() -> None:
        begun = done.copy()
        barrier = threading.Barrier(2)
        mine: Counter[int] = Counter()
        share_out(lambda i, _: (mine.update((i,)), barrier.wait(DEADLINE_S / 4)), 2, 2)
        assert (mine, done) == ({0: 1, 1: 1}, begun)

    def task(i: int, thread: int) -> None:
        done.update((i,))
        if i == 0:
            forking = threading.Thread(target=lambda: outcome.append(fork(child)))
            forking.start()
            forking.join()
            forked.set()
        forked.wait(DEADLINE_S)

    outcome: list[int | None] = []
    forked = threading.Event()
    share_out(lambda *_: None, 2, 2)
    share_out(task, 64, 2)
    assert outcome == [0]
    assert done == Counter(range(64))


STRESS = """
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>
#include "pool.h"
struct job { _Atomic int64_t done[16]; int64_t call; _Atomic int64_t wrong; };
static _Atomic int64_t current;
static void task(const void *context, int64_t i, int64_t thread) {
    struct job *job = (struct job *)context;
    if (job->call != atomic_load(&current)) atomic_fetch_add(&job->wrong, 1);
    atomic_fetch_add(&job->done[i], 1);
}
int64_t stress(int64_t calls, int64_t threads) {
    static struct job jobs[2];
    int64_t wrong = 0;
    for (int64_t call = 1; call <= calls; call++) {
        struct job *job = &jobs[call % 2];
        int64_t count = call * 7 % 16 + 1;
        for (int i = 0; i < 16; i++) job->done[i] = 0;
        job->call = call;
        atomic_store(&current, call);
        kvshard_share_out(task, job, count, call % threads + 1);
        for (int i = 0; i < 16; i++) wrong += job->done[i] != (i < count);
        wrong += job->wrong;
    }
    return wrong;
}
static _Atomic int64_t begun, ended;
static void meet(const void *context, int64_t i, int64_t thread) {
    atomic_fetch_add(&begun, 1);
    while (atomic_load(&begun) < 2) usleep(100);
    if (thread) usleep(50000);  // the caller has long gone to sleep
    atomic_fetch_add(&ended, 1);
}
int64_t outlast(void) {
    begun = ended = 0;
    kvshard_share_out(meet, NULL, 2, 2);
    return ended;
}
"""


@pytest.fixture(scope="module")
def stress(share_out, tmp_path_factory) -> ctypes.CDLL:
    source = tmp_path_factory.mktemp("pool") / "stress.c"
    source.write_text(STRESS)
    library = load_library(source, f"-I{FOLDER}")
    library.stress.restype = library.outlast.restype = ctypes.c_int64
    return library


def test_thousands_of_short_calls(stress):
    assert stress.stress(ctypes.c_int64(20_000), ctypes.c_int64(6)) == 0


def test_a_caller_sleeps_until_the_last_task_ends(stress):
    for _ in range(3):
        assert stress.outlast() == 2

"""Forks shard processes from one process that has imported torch already.

Importing torch takes seconds of CPU time a process; forked shards share the imported pages. A user's
script needs no `if __name__ == "__main__"` guard, since it is never imported again.

Protocol, on stdin and stdout: the parent writes length-prefixed jobs, then keeps stdin open; the
nursery writes a line "rank status" for each child that ends, status as in os.waitpid. When stdin is
closed, because the parent is done or dead, the children are killed.
"""

import os
import select
import signal
import struct
import sys
from collections.abc import Callable
from typing import BinaryIO

from kvshard.runtime.messages import ShardJob

LENGTH = struct.Struct("<I")


def main() -> None:
    # Here: the launcher imports this module too, and needs no torch.
    from kvshard.runtime.shard.main import run_shard

    source, report = sys.stdin.buffer, sys.stdout.fileno()
    # A child must not write into the report pipe, and Ctrl-C is the coordinator's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        jobs = [ShardJob.from_bytes(_read(source, _read_length(source))) for _ in range(_read_length(source))]
    except EOFError:
        return  # the parent died before it had told all
    wake, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    children: dict[int, int] = {}
    for job in jobs:
        if select.select([source], [], [], 0)[0]:
            break  # the parent has given up while torch was imported
        pid = os.fork()
        if pid == 0:
            _run_child(run_shard, job, wake, wake_write)
        children[pid] = job.rank
    while children:
        ready, _, _ = select.select([source, wake], [], [])
        if wake in ready:
            os.read(wake, 64)
            _reap(children, report)
        if source in ready:
            break
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)
    os._exit(0)  # an interpreter with torch in it takes 0.4 s to end, and there is nothing left to do


def _read_length(source: BinaryIO) -> int:
    (length,) = LENGTH.unpack(_read(source, LENGTH.size))
    return int(length)


def _read(source: BinaryIO, count: int) -> bytes:
    data = source.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _run_child(run_shard: Callable[[ShardJob], None], job: ShardJob, *descriptors: int) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for descriptor in descriptors:
        os.close(descriptor)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)  # what a library prints goes to stderr
    status = 1
    try:
        run_shard(job)
        status = 0
    finally:
        # Not sys.exit: the parent's exit handlers and buffers are not this process's.
        os._exit(status)


def _reap(children: dict[int, int], report: int) -> None:
    for pid in list(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            os.write(report, b"%d %d\n" % (children.pop(pid), status))


if __name__ == "__main__":
    main()

"""A shard's end of the control channel, and the thread that watches it.

The watch thread has a socket of its own (a ZeroMQ socket belongs to one thread), so a shard
that is busy in a step still answers health and stack requests, and stops at once when the
coordinator dies.
"""

import os
import resource
import sys
import threading
import traceback
from collections.abc import Callable

import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from ..coordinator.channel import HEARTBEAT_MS, LOST_AFTER_MS, shard_identity, watch_identity
from ..messages import Kind, ShardJob, pack

STOP = "inproc://stop"  # one context a link, so the name is free
NEVER_MS = 24 * 3600 * 1000
GRACE_S = 3.0  # for a shard that was told to close, to do so before it is taken for lost


def _dealer(context: "zmq.Context[zmq.Socket[bytes]]", job: ShardJob, identity: bytes) -> "zmq.Socket[bytes]":
    """A DEALER not yet connected; a lost coordinator is final, so it is not to reconnect.

    An interval of -1 would say that, but ZeroMQ then drops what came last and was not read yet.
    """
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.IDENTITY, identity)
    dealer.setsockopt(zmq.LINGER, 2_000)
    dealer.setsockopt(zmq.RCVHWM, 0)
    dealer.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, LOST_AFTER_MS)
    dealer.setsockopt(zmq.RECONNECT_IVL, NEVER_MS)
    if job.curve is not None:
        dealer.curve_serverkey = job.curve.server_public.encode()
        dealer.curve_publickey = job.curve.client_public.encode()
        dealer.curve_secretkey = job.curve.client_secret.encode()
    return dealer


class Link:
    """Messages to and from the coordinator, for the shard's main loop."""

    def __init__(self, job: ShardJob) -> None:
        self._context = zmq.Context()
        self._socket = _dealer(self._context, job, shard_identity(job.rank))
        self._socket.connect(job.endpoint)
        self._watch = _Watch(self._context, job)
        self._watch.start()

    def send(self, kind: Kind, payload: bytes) -> None:
        self._socket.send_multipart((kind.value, payload))

    def receive(self) -> tuple[Kind, bytes]:
        """The next message; the watch thread ends the process if the coordinator goes away before CLOSE."""
        kind, payload = self._socket.recv_multipart()
        if kind == Kind.CLOSE.value:
            self._watch.told_to_close.set()
        return Kind(kind), payload

    def has_message(self) -> bool:
        return bool(self._socket.poll(0))

    def note_step(self, step_id: int) -> None:
        """Tell the watch thread how far the shard is (for health answers)."""
        self._watch.last_step_id = step_id

    def on_lost(self, action: Callable[[], None]) -> None:
        """Run `action` before the process ends because the coordinator is gone."""
        self._watch.on_lost = action

    def close(self) -> None:
        self._watch.stop()
        self._socket.close()
        self._context.term()


class _Watch(threading.Thread):
    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", job: ShardJob) -> None:
        super().__init__(name="kvshard-watch", daemon=True)
        self._context = context
        self._job = job
        self._end = context.socket(zmq.PAIR)  # the main thread's end
        self._end.bind(STOP)
        self.told_to_close = threading.Event()
        self.last_step_id = -1
        self.on_lost: Callable[[], None] = lambda: None

    def stop(self) -> None:
        self.told_to_close.set()
        self._end.send(b"")
        self.join()
        self._end.close()

    def run(self) -> None:
        try:
            self._serve()
        except Exception:  # noqa: BLE001 - a shard that nobody watches would outlive its coordinator
            traceback.print_exc()
            self.on_lost()
            os._exit(1)

    def _serve(self) -> None:
        dealer = _dealer(self._context, self._job, watch_identity(self._job.rank))
        # Watched from before the connection, so that a coordinator which dies meanwhile is noticed.
        monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        dealer.connect(self._job.endpoint)
        dealer.send_multipart((Kind.WATCH.value, b""))
        stop = self._context.socket(zmq.PAIR)
        stop.connect(STOP)
        poller = zmq.Poller()
        for watched in (dealer, monitor, stop):
            poller.register(watched, zmq.POLLIN)
        while stop not in (ready := dict(poller.poll())):
            if monitor in ready:
                recv_monitor_message(monitor)
                self._coordinator_lost()
            if dealer in ready:
                kind = Kind(dealer.recv_multipart()[0])
                answer = stacks() if kind is Kind.STACKS else self._health()
                dealer.send_multipart((kind.value, pack(answer)))
        dealer.disable_monitor()
        for watched in (monitor, dealer, stop):
            watched.close()

    def _health(self) -> dict[str, int]:
        return {"last_step_id": self.last_step_id, "peak_memory_bytes": peak_memory_bytes(self._job.device)}

    def _coordinator_lost(self) -> None:
        """Nobody is left to report to and the main thread may be inside a collective: end the process."""
        if self.told_to_close.wait(GRACE_S):
            return
        self.on_lost()
        os._exit(1)


def peak_memory_bytes(device: str) -> int:
    """Peak allocated bytes of a CUDA device, or this process's peak resident set on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def stacks() -> str:
    """The Python stacks of all threads of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        parts.append(f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame)))
    return "\n".join(parts)

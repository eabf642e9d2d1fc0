"""The control channel: who gets through, and what stays behind."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import zmq

from kvshard.runtime.coordinator.channel import (
    ControlChannel,
    PeerGone,
    interface_address,
    shard_identity,
)
from kvshard.runtime.errors import ConfigError
from kvshard.runtime.messages import CurveKeys, Kind

WAIT_S = 20.0


@pytest.fixture(autouse=True)
def private_temp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kv-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


def open_channel(
    address: str | None = None, high_water_mark: int = 16, send_timeout_s: float = 1.0
) -> ControlChannel:
    return ControlChannel(address=address, high_water_mark=high_water_mark, send_timeout_s=send_timeout_s)


def dealer(
    context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, rank: int = 0, curve: CurveKeys | None = None
) -> "zmq.Socket[bytes]":
    """A peer that is to be held as long as it has messages to send: dropped, it closes at once.

    Without a LINGER of 0 it would try for ever, and the context's end would wait for it.
    """
    made = context.socket(zmq.DEALER)
    made.setsockopt(zmq.LINGER, 0)
    made.setsockopt(zmq.IDENTITY, shard_identity(rank))
    if curve is not None:
        made.curve_serverkey = curve.server_public.encode()
        made.curve_publickey = curve.client_public.encode()
        made.curve_secretkey = curve.client_secret.encode()
    made.connect(endpoint)
    return made


def test_messages_pass_both_ways_and_the_socket_has_no_file(
    private_temp: Path, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    channel = open_channel()
    shard = dealer(context, channel.endpoint, 3)
    shard.send_multipart((Kind.HELLO.value, b"here"))
    assert channel.receive(WAIT_S) == (3, Kind.HELLO, b"here")
    channel.send(shard_identity(3), Kind.PLAN, b"do")
    assert shard.poll(WAIT_S * 1000)
    assert shard.recv_multipart() == [Kind.PLAN.value, b"do"]
    folder = private_temp / f"kvshard-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.iterdir()) == []
    channel.close()


def test_a_message_to_nobody_is_an_error(context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    channel = open_channel()
    with pytest.raises(PeerGone, match="shard 5"):
        channel.send(shard_identity(5), Kind.PLAN, b"")
    channel.close()


def test_a_peer_that_takes_nothing_is_an_error_in_time(context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    channel = open_channel(high_water_mark=1, send_timeout_s=0.05)
    shard = context.socket(zmq.DEALER)
    shard.setsockopt(zmq.IDENTITY, shard_identity(0))
    shard.setsockopt(zmq.RCVHWM, 1)
    shard.connect(channel.endpoint)
    shard.send_multipart((Kind.HELLO.value, b""))
    assert channel.receive(WAIT_S) is not None
    with pytest.raises(PeerGone, match="shard 0"):  # noqa: PT012 - how many the kernel takes is its own affair
        for _ in range(10_000):
            channel.send(shard_identity(0), Kind.PLAN, bytes(100_000))
    shard.close(linger=0)
    channel.close()


def test_the_last_message_before_closing_arrives(context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    channel = open_channel()
    shard = dealer(context, channel.endpoint)
    shard.send_multipart((Kind.HELLO.value, b""))
    assert channel.receive(WAIT_S) is not None
    for _ in range(10):
        channel.send(shard_identity(0), Kind.CLOSE, bytes(50_000))
    channel.close()
    for _ in range(10):
        assert shard.poll(WAIT_S * 1000), "a message was dropped"
        assert shard.recv_multipart()[0] == Kind.CLOSE.value


def test_sockets_of_the_dead_are_removed(private_temp: Path) -> None:
    folder = private_temp / f"kvshard-{os.getuid()}"
    folder.mkdir(mode=0o700)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(WAIT_S)
    stale, alive, other = folder / f"{ended.pid}-aa", folder / f"{os.getpid()}-bb", folder / "notes"
    for path in (stale, alive, other):
        path.touch()
    open_channel().close()
    assert sorted(folder.iterdir()) == sorted([alive, other])


def test_a_folder_open_to_others_is_refused(private_temp: Path) -> None:
    folder = private_temp / f"kvshard-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="0700"):
        open_channel()
    folder.rmdir()
    folder.touch()
    with pytest.raises(ConfigError, match="must be a folder"):
        open_channel()


def test_a_temporary_folder_with_a_long_path_is_told(
    private_temp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = private_temp / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(ConfigError, match="TMPDIR"):
        open_channel()


def test_over_tcp_only_the_holder_of_the_key_gets_through(context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    channel = open_channel("127.0.0.1")
    assert channel.endpoint.startswith("tcp://127.0.0.1:")
    assert channel.curve is not None
    public, secret = (key.decode() for key in zmq.curve_keypair())
    wrong = replace(channel.curve, client_public=public, client_secret=secret)
    intruders = [dealer(context, channel.endpoint, rank, curve) for rank, curve in ((1, None), (2, wrong))]
    for intruder in intruders:
        intruder.send_multipart((Kind.HELLO.value, b"let me in"))
    shard = dealer(context, channel.endpoint, 0, channel.curve)
    shard.send_multipart((Kind.HELLO.value, b"me"))
    assert channel.receive(WAIT_S) == (0, Kind.HELLO, b"me")
    assert channel.receive(1.0) is None
    for rank in (1, 2):
        with pytest.raises(PeerGone):
            channel.send(shard_identity(rank), Kind.PLAN, b"secret")
    channel.close()


def test_an_address_in_use_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"{where}.*in use.*network.interface"):
            open_channel(where)


def test_interface_address() -> None:
    loopback = next(
        name
        for name, entries in psutil.net_if_addrs().items()
        if any(e.address == "127.0.0.1" for e in entries)
    )
    assert interface_address(loopback, "unused") == "127.0.0.1"
    assert interface_address(None, "127.0.0.1") == "127.0.0.1"
    with pytest.raises(ConfigError, match=f"network.interface='nowhere0' .*{loopback}"):
        interface_address("nowhere0", "127.0.0.1")
    with pytest.raises(
        ConfigError, match=r"no way from here to host no\.such\.host\.invalid.*network\.interface"
    ):
        interface_address(None, "no.such.host.invalid")


def test_an_interface_without_ipv4_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"ib0": []})
    with pytest.raises(ConfigError, match=r"network.interface='ib0' has no IPv4"):
        interface_address("ib0", "127.0.0.1")

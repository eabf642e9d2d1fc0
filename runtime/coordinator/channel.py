"""The coordinator's end of the control channel: one ROUTER socket for every launcher.

On one host it is an ipc socket in a folder that only this user can enter. Across hosts it is
tcp on one named interface, encrypted and authenticated with CURVE and a key made for this job.
"""

import os
import secrets
import socket
import stat
import tempfile
from pathlib import Path

import psutil
import zmq
from zmq.auth.thread import ThreadAuthenticator

from ..errors import ConfigError
from ..messages import CurveKeys, Kind

HEARTBEAT_MS = 2_000
LOST_AFTER_MS = 10_000


class PeerGone(ConnectionError):
    """A message could not be handed to a shard: it is no longer connected."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"shard {rank} is not connected")
        self.rank = rank


def shard_identity(rank: int) -> bytes:
    return b"shard-%d" % rank


def watch_identity(rank: int) -> bytes:
    return b"watch-%d" % rank


class ControlChannel:
    """A bound ROUTER. Used from one thread."""

    def __init__(self, *, address: str | None, high_water_mark: int, send_timeout_s: float) -> None:
        """Bind. `address` None: ipc on this host; else the IPv4 address to bind tcp on (a free port).

        Raises ConfigError when the address cannot be bound.
        """
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, high_water_mark)
        self._socket.setsockopt(zmq.SNDTIMEO, int(send_timeout_s * 1000))
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, LOST_AFTER_MS)
        self._authenticator: ThreadAuthenticator | None = None
        self._ipc_path: Path | None = None
        self.curve: CurveKeys | None = None
        try:
            if address is None:
                self._ipc_path = _socket_folder() / f"{os.getpid()}-{secrets.token_hex(4)}"
                self._socket.bind(f"ipc://{self._ipc_path}")
            else:
                self.curve = self._secure()
                self._socket.bind(address if address.startswith("tcp://") else f"tcp://{address}:*")
        except zmq.ZMQError as error:
            where = self._ipc_path or address
            self.close()
            raise ConfigError(
                f"cannot listen on {where} for the shards: {error.strerror}; "
                "free the address or set network.interface to another one"
            ) from None
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _secure(self) -> CurveKeys:
        server_public, server_secret = zmq.curve_keypair()
        client_public, client_secret = zmq.curve_keypair()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", credentials_provider=_OneKey(client_public))
        self._socket.curve_secretkey = server_secret
        self._socket.curve_publickey = server_public
        self._socket.curve_server = True
        return CurveKeys(server_public.decode(), client_public.decode(), client_secret.decode())

    def send(self, identity: bytes, kind: Kind, payload: bytes) -> None:
        """Hand one message to a peer. Raises PeerGone when it is not connected or takes nothing."""
        try:
            self._socket.send_multipart((identity, kind.value, payload), copy=True)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise PeerGone(_rank(identity)) from None
            raise

    def receive(self, timeout_s: float) -> tuple[int, Kind, bytes] | None:
        """The next message as (rank, kind, payload), or None after `timeout_s` seconds."""
        if not self._socket.poll(max(0, int(timeout_s * 1000))):
            return None
        identity, kind, payload = self._socket.recv_multipart()
        return _rank(identity), Kind(kind), payload

    def close(self) -> None:
        self._socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()
        if self._ipc_path is not None:
            self._ipc_path.unlink(missing_ok=True)


class _OneKey:
    """ZAP credentials: exactly one client key may connect."""

    def __init__(self, client_public: bytes) -> None:
        self._key = client_public

    def callback(self, domain: str, key: bytes) -> bool:
        return zmq.utils.z85.encode(key) == self._key


def _rank(identity: bytes) -> int:
    return int(identity.rpartition(b"-")[2])


def _socket_folder() -> Path:
    """A per-user folder with mode 0700 and a short path (socket paths are limited to 107 bytes).

    Sockets of coordinators that were killed are removed here.
    """
    folder = Path(tempfile.gettempdir()) / f"kvshard-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o077:
        raise ConfigError(
            f"{folder} must be a folder that only you can enter; remove it or fix its mode to 0700"
        )
    for left in folder.iterdir():
        pid = left.name.partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            left.unlink(missing_ok=True)
    return folder


def interface_address(interface: str | None, peer: str) -> str:
    """The IPv4 address of `interface`, or of the interface that reaches host `peer`. Raises ConfigError."""
    if interface is None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))  # no packet is sent: this only asks the routing table
            return str(probe.getsockname()[0])
    addresses = psutil.net_if_addrs()
    if interface not in addresses:
        raise ConfigError(
            f"network.interface={interface!r} is not on this host; it has {', '.join(sorted(addresses))}"
        )
    for entry in addresses[interface]:
        if entry.family == socket.AF_INET:
            return str(entry.address)
    raise ConfigError(f"network.interface={interface!r} has no IPv4 address")

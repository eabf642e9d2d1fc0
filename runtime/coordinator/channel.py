"""The coordinator's end of the control channel: one ROUTER socket for every launcher.

On one host it is an ipc socket that only this user can reach. Across hosts it is tcp on one named
interface, encrypted and authenticated with CURVE and a key made for this job.
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
LINGER_MS = 2_000  # for the last message, which tells the shards to close


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
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.SNDHWM, high_water_mark)
        self._socket.setsockopt(zmq.SNDTIMEO, int(send_timeout_s * 1000))
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, LOST_AFTER_MS)
        self._authenticator: ThreadAuthenticator | None = None
        self._ipc_file: int | None = None
        self.curve: CurveKeys | None = None
        try:
            self.endpoint = self._bind_ipc() if address is None else self._bind_tcp(address)
        except ConfigError:
            self.close()
            raise

    def _bind_ipc(self) -> str:
        """Bind in a private folder and take the name away at once, so that no death can leave it behind.

        The shards connect through /proc, which only lets this user in.
        """
        path = _socket_folder() / f"{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self._socket.bind(f"ipc://{path}")
        except zmq.ZMQError as error:
            raise ConfigError(
                f"cannot listen on the socket {path} for the shards: {error.strerror}; "
                "set the environment variable TMPDIR to another folder, with a short path"
            ) from None
        self._ipc_file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        path.unlink()
        return f"ipc:///proc/{os.getpid()}/fd/{self._ipc_file}"

    def _bind_tcp(self, address: str) -> str:
        self.curve = self._secure()
        try:
            self._socket.bind(address if address.startswith("tcp://") else f"tcp://{address}:*")
        except zmq.ZMQError as error:
            raise ConfigError(
                f"cannot listen on {address} for the shards: {error.strerror}; "
                "free the address or set network.interface to another one"
            ) from None
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

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
        if self._ipc_file is not None:
            os.close(self._ipc_file)
            self._ipc_file = None


class _OneKey:
    """ZAP credentials: exactly one client key may connect."""

    def __init__(self, client_public: bytes) -> None:
        self._key = client_public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._key  # both as Z85 text


def _rank(identity: bytes) -> int:
    return int(identity.rpartition(b"-")[2])


def _socket_folder() -> Path:
    """A per-user folder with mode 0700 and a short path (socket paths are limited to 107 bytes).

    A coordinator that was killed right between binding and unlinking leaves its socket here; it is removed.
    """
    folder = Path(tempfile.gettempdir()) / f"kvshard-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass  # whatever it is, it is checked below
    except OSError as error:
        raise ConfigError(
            f"cannot create {folder} for the control socket: {error.strerror}; set TMPDIR"
        ) from None
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
            try:
                probe.connect((peer, 9))  # no packet is sent: this only asks the routing table
            except OSError as error:
                raise ConfigError(
                    f"no way from here to host {peer}: {error.strerror}; check its name, or set network.interface"
                ) from None
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

"""Shards as Ray actors. Ray places, starts and watches them; no plan or result goes through it."""

import math
import os
import signal
import socket
import threading
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..runtime.config import JobConfig
from ..runtime.coordinator.launcher import Placement
from ..runtime.errors import ConfigError
from ..runtime.messages import ShardJob

MAX_CPUS_PER_SHARD = 1.0
MIN_CPUS_PER_SHARD = 0.01
CONNECT_S = 10.0  # for the cluster's head to answer


class ShardActor:
    """One shard. The shard loop has a thread of its own, so the other methods always answer."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._failure: str | None = None
        self._device = "cpu"
        # Ray's handler raises wherever the main thread is, which the job's log tells when an actor is ended.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def where(self) -> tuple[str, str, list[tuple[int, str]]]:
        """Node id, node address and the GPUs that Ray gave this actor, in an order that has 2 before 10.

        They are what CUDA_VISIBLE_DEVICES calls them: numbers, or UUIDs of GPUs and of parts of them (MIG).
        """
        context = ray.get_runtime_context()
        gpus = [(len(gpu), gpu) for gpu in context.get_accelerator_ids().get("GPU", [])]
        return context.get_node_id(), ray.util.get_node_ip_address(), gpus

    def start(self, job: bytes) -> None:
        """Begin to serve plans; returns at once."""
        shard_job = ShardJob.from_bytes(job)
        self._device = shard_job.device
        self._thread = threading.Thread(
            target=self._serve, args=(shard_job,), name="kvshard-shard", daemon=True
        )
        self._thread.start()

    def join(self) -> str | None:
        """Returns when the shard has ended: None, or why it failed."""
        self._ended.wait()
        return self._failure

    def health(self) -> dict[str, Any]:
        """Whether the shard runs, its process and its peak memory in bytes."""
        from ..runtime.shard.link import peak_memory_bytes

        running = self._thread is not None and self._thread.is_alive()
        return {"running": running, "pid": os.getpid(), "peak_memory_bytes": peak_memory_bytes(self._device)}

    def stacks(self) -> str:
        """The Python stacks of every thread of this actor."""
        from ..runtime.shard.link import stacks

        return stacks()

    def _serve(self, job: ShardJob) -> None:
        # Imported here: the driver, which also imports this module, needs no torch.
        from ..runtime.shard.main import run_shard

        try:
            run_shard(job)
        except SystemExit:
            self._failure = "it reported an error"
        finally:
            self._ended.set()


# Not a decorator: under one the class would no longer be a type to a type checker.
_RemoteShard = ray.remote(max_restarts=0, max_concurrency=4)(ShardActor)


class RayLauncher:
    """A placement group of one bundle a shard, and one actor in each bundle."""

    def __init__(self, config: JobConfig) -> None:
        self._config = config
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._joins: dict[Any, int] = {}
        self._started_ray = False

    def num_gpus(self) -> int:
        """GPUs of the whole cluster, used or not."""
        self._connect()
        return int(ray.cluster_resources().get("GPU", 0))

    def place(self, device: str) -> list[Placement]:
        self._connect()
        size = self._config.tensor_parallel_size
        bundle = _bundle(device, size)
        self._group = placement_group([bundle] * size, strategy="PACK")
        if not self._group.wait(self._config.timeouts.place_s):
            raise ConfigError(self._no_room(bundle, size))
        actors = [
            _RemoteShard.options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=index
                ),
            ).remote()
            for index in range(size)
        ]
        places = self._where(actors)
        # Ranks follow the placement: neighbours on one node, GPUs in their order, the driver's node first.
        driver = ray.get_runtime_context().get_node_id()
        order = sorted(range(size), key=lambda i: (places[i][0] != driver, places[i][0], places[i][2], i))
        self._actors = [actors[i] for i in order]
        own = "cuda:0" if device == "cuda" else "cpu"  # Ray shows an actor only its own GPU
        return [Placement(places[i][1], places[i][0] == driver, own) for i in order]

    def start(self, jobs: list[ShardJob]) -> None:
        for actor, job in zip(self._actors, jobs, strict=True):
            actor.start.remote(job.to_bytes())
            self._joins[actor.join.remote()] = job.rank

    def dead(self) -> dict[int, str]:
        done, _ = ray.wait(list(self._joins), num_returns=len(self._joins), timeout=0)
        ended = {}
        for reference in done:
            try:
                reason = ray.get(reference) or "it ended"
            except RayActorError as error:
                reason = f"its Ray actor died: {error}"
            ended[self._joins[reference]] = reason
        return ended

    def stacks(self) -> dict[int, str]:
        """Stacks asked through Ray, for a shard whose control channel does not answer."""
        return dict(enumerate(ray.get([actor.stacks.remote() for actor in self._actors])))

    def close(self, timeout_s: float) -> None:
        if self._joins:
            ray.wait(list(self._joins), num_returns=len(self._joins), timeout=timeout_s)
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._joins = [], {}
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        address = self._config.ray.address or os.environ.get("RAY_ADDRESS")
        if address:
            _check_reachable(address)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                address=address,
                include_dashboard=None if address else False,
                log_to_driver=True,
                logging_level="warning",
                configure_logging=False,
            )
        except (ConnectionError, ValueError, RuntimeError, RayError) as error:
            if not address:
                raise ConfigError(f"cannot start Ray on this host: {error}") from None
            raise ConfigError(
                f"cannot join the Ray cluster at {address}: {error}; check ray.address or RAY_ADDRESS. If the cluster "
                "asks for a token, set RAY_AUTH_MODE=token and have the cluster's ~/.ray/auth_token here"
            ) from None
        finally:
            # Ray's own handler ends the process on the spot; a job finishes its step and its output first.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
        self._started_ray = True

    def _no_room(self, bundle: dict[str, float], size: int) -> str:
        free = ray._private.state.available_resources_per_node()
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
        lines = [
            f"Ray could not place {size} shards of {wanted} each within timeouts.place_s="
            f"{self._config.timeouts.place_s:g} s; free now:"
        ]
        for node in ray.nodes():
            if node["Alive"]:
                left = free.get(node["NodeID"], {})
                have = ", ".join(
                    f"{left.get(name, 0):g} of {node['Resources'].get(name, 0):g} {name}" for name in bundle
                )
                lines.append(f"  {node['NodeManagerAddress']}: {have}")
        lines.append("lower tensor_parallel_size, add nodes, or wait for other jobs to end")
        return "\n".join(lines)

    def _where(self, actors: list[Any]) -> list[tuple[str, str, list[tuple[int, str]]]]:
        try:
            places: list[tuple[str, str, list[tuple[int, str]]]] = ray.get(
                [actor.where.remote() for actor in actors], timeout=self._config.timeouts.place_s
            )
        except RayError as error:
            raise ConfigError(
                f"a shard actor did not start: {error}; is kvshard installed on every node, in the same version?"
            ) from None
        return places


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes, and says nothing meanwhile. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise ConfigError(
            f"ray.address={address} is for Ray clients; run kvshard on a node of the cluster and set host:port or auto"
        )
    if not port.isdigit():
        return  # auto, local
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); check ray.address or RAY_ADDRESS, or "
            "leave both out to start a cluster on this host"
        ) from None


def _bundle(device: str, size: int) -> dict[str, float]:
    """Resources of one shard. CPU shards take fractions, so that more shards than cores can run."""
    if device == "cuda":
        return {"CPU": 1.0, "GPU": 1.0}
    cores = ray.cluster_resources().get("CPU", 1.0)
    share = math.floor(100 * min(MAX_CPUS_PER_SHARD, cores / size)) / 100
    return {"CPU": max(MIN_CPUS_PER_SHARD, share)}

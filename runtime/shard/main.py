"""The main function of a shard process, the same for every launcher."""

import os
import socket
from collections import deque
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed import Store, TCPStore

import kvshard

from ...parallel.group import Group, GroupError
from ...parallel.shard_map import ShardMap
from ..config import JobConfig, config_hash
from ..coordinator.executor import ShardInfo
from ..coordinator.plan import decode_plan, encode_result
from ..errors import ConfigError
from ..messages import Hello, Kind, ShardJob, Start, pack, unpack
from ..models.checkpoint import Checkpoint, open_checkpoint
from ..observe.host import host_cores, host_memory_bytes
from .link import Link
from .worker import PendingResult, Worker


def run_shard(job: ShardJob) -> None:
    """Serve plans until the coordinator says CLOSE. Failures are reported to it, then end the process."""
    with ExitStack() as held:
        link = Link(job)
        held.callback(link.close)
        try:
            _Shard(job, link, held).serve()
        except Exception as error:  # noqa: BLE001 - whatever it is, the coordinator is the one to raise it
            # Before the group is closed: that may take its time, and makes other ranks report what follows from it.
            link.send(Kind.ERROR, pack(_report(error)))
            raise SystemExit(1) from None


def _report(error: Exception) -> dict[str, Any]:
    missing: tuple[int, ...] = ()
    if isinstance(error, GroupError):
        cause, missing = "group", error.missing
    elif isinstance(error, (ConfigError, OSError)) and not isinstance(error, TimeoutError):
        cause = "config"  # a file or an address; a step that is late (TimeoutError) is the shard's
    else:
        cause = "shard"
    message = str(error) if cause != "shard" else f"{type(error).__name__}: {error}"
    return {"cause": cause, "message": message, "missing": missing}


class _Shard:
    def __init__(self, job: ShardJob, link: Link, held: ExitStack) -> None:
        """What the shard comes to hold is given back when `held` is left."""
        self._job = job
        self._link = link
        self._held = held
        self._config = JobConfig.model_validate_json(job.config_json)
        self._device = torch.device(job.device)

    def serve(self) -> None:
        store = self._host_store() if self._job.rank == 0 and self._job.world_size > 1 else None
        self._link.send(Kind.HELLO, pack(asdict(self._hello(store))))
        kind, payload = self._link.receive()
        if kind is Kind.CLOSE:
            return
        assert kind is Kind.START, f"expected START, got {kind}"
        start = Start(**unpack(payload))
        # Ray and torchrun force one OpenMP thread a process; the setting belongs to the calling thread.
        torch.set_num_threads(start.threads[self._job.rank])
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        checkpoint = open_checkpoint(Path(self._job.model_path))
        group = self._connect_group(store, start, checkpoint.spec.hidden_size)
        self._held.callback(group.close)
        self._link.on_lost(lambda: group.abort("the coordinator is gone"))
        worker = self._load(checkpoint, group, start)
        info = shard_info(worker, start.threads[self._job.rank])
        self._link.send(Kind.READY, pack(asdict(info)))
        self._run_plans(worker)

    def _host_store(self) -> TCPStore:
        """The rendezvous store, listening on the one address by which the other shards reach this host."""
        listener = socket.create_server((self._job.store_host, 0))
        port = listener.getsockname()[1]
        return TCPStore(
            self._job.store_host,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def _hello(self, store: TCPStore | None) -> Hello:
        if self._device.type == "cuda":
            properties = torch.cuda.get_device_properties(self._device)
            memory, device_id = properties.total_memory, str(properties.uuid)
        else:
            memory, device_id = host_memory_bytes(), host_id()
        return Hello(
            version=kvshard.__version__,
            config_hash=config_hash(self._config),
            host=socket.gethostname(),
            host_id=host_id(),
            device_id=device_id,
            pid=os.getpid(),
            num_cores=host_cores(),
            memory_bytes=memory,
            store=f"{store.host}:{store.port}" if store is not None else "",
        )

    def _connect_group(self, own_store: TCPStore | None, start: Start, hidden_size: int) -> Group:
        job, config = self._job, self._config
        max_bytes = config.scheduler.max_num_batched_tokens * hidden_size * 4
        if job.world_size == 1:
            return Group.single(self._device)
        store: Store
        if own_store is not None:
            store = own_store
        else:
            host, _, port = start.store.rpartition(":")
            store = TCPStore(host, int(port), is_master=False, wait_for_workers=False)
        return Group.connect(
            store,
            rank=job.rank,
            world_size=job.world_size,
            epoch=job.epoch,
            job_id=job.job_id,
            device=self._device,
            host_id=host_id(),
            timeout_s=config.timeouts.step_s,
            max_bytes=max_bytes,
            interface=config.network.interface,
        )

    def _load(self, checkpoint: Checkpoint, group: Group, start: Start) -> Worker:
        shard_map = ShardMap.build(checkpoint.spec.dims, self._job.world_size, self._config.shard_weights)
        with checkpoint:
            worker = Worker(self._config, checkpoint, shard_map, group, start.max_model_len)
        worker.allocate(start.num_blocks)
        return worker

    def _run_plans(self, worker: Worker) -> None:
        """Launch each plan as soon as it comes, also while the device works on earlier ones; answer in order."""
        launched: deque[PendingResult] = deque()
        while True:
            while launched and launched[0].done_before(self._link.has_message):
                self._answer(launched.popleft())
            kind, payload = self._link.receive()
            if kind is Kind.CLOSE:
                return
            assert kind is Kind.PLAN, f"expected PLAN, got {kind}"
            plan = decode_plan(payload)
            assert plan.epoch == self._job.epoch, f"a plan of epoch {plan.epoch} in epoch {self._job.epoch}"
            launched.append(worker.run(plan))
            self._link.note_step(plan.step_id)

    def _answer(self, pending: PendingResult) -> None:
        result = pending.wait()
        if self._job.rank == 0:
            self._link.send(Kind.RESULT, encode_result(result))
        else:
            self._link.send(Kind.CHECK, pack((result.epoch, result.step_id, result.checksum())))


def shard_info(worker: Worker, threads: int) -> ShardInfo:
    """What a loaded worker holds, measured on its storages."""
    return ShardInfo(
        rank=worker.group.rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        device=str(worker.device),
        num_q_heads=len(worker.shard.q_heads),
        num_kv_heads=len(worker.shard.kv_heads),
        weight_bytes=worker.weight_bytes,
        kv_bytes=worker.cache.num_bytes,
        num_layer_blocks=worker.cache.num_layer_blocks,
        group_backend=worker.group.backend,
        threads=threads,
    )


def host_id() -> str:
    """Equal for processes of one running kernel and host name: only those may try to share memory."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}:{boot_id.read_text().strip() if boot_id.exists() else ''}"

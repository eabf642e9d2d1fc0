"""Collectives over shared memory, for ranks on one host without NCCL.

The idea of one double-buffered slot per rank and one wait per collective is the one of vLLM's CPU back end
(csrc/cpu/shm.cpp) and DeepSpeed's inference_all_reduce. Layout and protocol: shared_memory_layout.py.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from functools import partial

from torch import Tensor

from .all_reduce import GroupError
from .shared_memory_layout import ABORTED, DEAD, MISMATCH, TIMEOUT, Segment
from .shared_memory_native import NativeRing
from .shared_memory_python import PythonRing

_MAX_REASON = 150  # characters of an abort's reason that are passed on


class SharedMemoryTransport:
    """The ring of one group. Sums are in rank order; float32 totals for bfloat16 and float16."""

    backend = "shared_memory"

    def __init__(
        self,
        segment: Segment,
        rank: int,
        process_ids: Sequence[int],
        *,
        timeout_s: float,
        library: ctypes.CDLL | None,
    ) -> None:
        """process_ids: of all ranks. library: the compiled ring, or None for the Python one. Raises OSError where
        processes cannot be watched."""
        self._segment = segment
        self._rank = rank
        self._timeout_s = timeout_s
        self._pidfds: list[int] = []
        try:
            for peer, process_id in enumerate(process_ids):
                self._pidfds.append(-1 if peer == rank else os.pidfd_open(process_id))
        except OSError:
            self.close()
            raise
        # With more ranks than cores, a rank that spins keeps the one it waits for from running.
        crowded = segment.world_size > len(os.sched_getaffinity(0))
        self._ring: NativeRing | PythonRing
        if library is not None:
            self._ring = NativeRing(
                library, segment, rank, pidfds=self._pidfds, timeout_s=timeout_s, crowded=crowded
            )
        else:
            self._ring = PythonRing(segment, rank, pidfds=self._pidfds, timeout_s=timeout_s, crowded=crowded)

    @property
    def sequence(self) -> int:
        """Number of the last collective begun."""
        return self._ring.sequence

    @property
    def playable(self) -> bool:
        """Whether its collectives are noted on a tape (kernels/cpu/tape.py)."""
        return isinstance(self._ring, NativeRing)

    def all_reduce(self, x: Tensor, where: str) -> None:
        self._ring.all_reduce(x, partial(self._failed, where))

    def all_gather(self, x: Tensor, out: Tensor, where: str) -> None:
        self._ring.all_gather(x, out, partial(self._failed, where))

    def barrier(self, where: str) -> None:
        self._ring.barrier(partial(self._failed, where))

    def abort(self, reason: str) -> None:
        self._segment.abort(self._rank, {"reason": reason[:_MAX_REASON], "missing": []})

    def close(self) -> None:
        """The mapping itself goes with the last reference to it: another thread may still be in a collective."""
        self.abort("the group is closed")
        for descriptor in self._pidfds:
            if descriptor >= 0:
                os.close(descriptor)
        self._pidfds = []

    def _failed(self, where: str, status: int) -> GroupError:
        """Also stops the other ranks: they learn what this one knows, and need not wait for it."""
        missing = self._ring.missing()
        if status == ABORTED:
            record = self._segment.abort_record()
            assert record is not None, "aborted without a record"
            by = "" if record["rank"] == self._rank else f" by rank {record['rank']}"
            gone = record["missing"]
            assert isinstance(gone, list), f"abort record {record}"
            return self._error(f"aborted{by}: {record['reason']}", where, gone)
        reason = {
            TIMEOUT: f"ranks {missing} did not arrive within {self._timeout_s:g} s",
            DEAD: f"the processes of ranks {missing} have ended",
            MISMATCH: f"ranks {missing} are in another collective (other op, dtype or size)",
        }[status]
        self._segment.abort(self._rank, {"reason": f"{where}: {reason}"[:_MAX_REASON], "missing": missing})
        return self._error(reason, where, missing)

    def _error(self, reason: str, where: str, missing: Iterable[int] = ()) -> GroupError:
        return GroupError(reason, rank=self._rank, where=where, sequence=self.sequence, missing=missing)

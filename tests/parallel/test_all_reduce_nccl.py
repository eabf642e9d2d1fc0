"""What can be said of NCCL without a GPU: how a group is let go of."""

from __future__ import annotations

import pytest
from torch import zeros

from kvshard.parallel.all_reduce import GroupError
from kvshard.parallel.all_reduce_nccl import NcclTransport


class StuckProcessGroup:
    """A process group with a collective under way whose peer has died."""

    def __init__(self) -> None:
        self.num_aborts = 0

    def abort(self) -> None:
        self.num_aborts += 1

    def shutdown(self) -> None:
        raise AssertionError("shutdown waits for the collective")


def test_closing_does_not_wait_for_peers() -> None:
    process_group = StuckProcessGroup()
    transport = NcclTransport.__new__(NcclTransport)  # its __init__ needs a GPU
    transport._process_group = process_group
    transport._aborted, transport._rank, transport.sequence = None, 1, 0
    transport.close()
    transport.close()
    assert process_group.num_aborts == 1
    with pytest.raises(GroupError, match="rank 1, layer 0, collective 1: aborted: the group is closed"):
        transport.all_reduce(zeros(1), "layer 0")

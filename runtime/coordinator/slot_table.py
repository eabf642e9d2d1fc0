"""What the coordinator knows of each slot, as arrays, so that a step over many rows stays cheap."""

import numpy as np
import numpy.typing as npt

from .plan import Int32
from .request import Request

Int64 = npt.NDArray[np.int64]


class SlotTable:
    """One entry a slot; entries of free slots mean nothing, except `serial`, which is -1.

    Counts run ahead of the results: a plan's tokens count as computed, and its samples as in
    flight, from the moment it is sent. So a row has `num_known + num_in_flight` tokens, of which
    the last is yet to be run through the model once its prompt is computed.
    """

    def __init__(self, num_slots: int) -> None:
        def zeros() -> Int32:
            return np.zeros(num_slots, np.int32)

        self.num_known = zeros()  # tokens the host knows, prompt and output
        self.num_in_flight = zeros()  # tokens sampled by sent plans whose results are not back
        self.num_computed = zeros()  # tokens found in the cache, or run through the model by sent plans
        self.num_prefill = zeros()  # tokens known at admission: the row decodes once they are computed
        self.capacity = zeros()  # tokens its block tables have entries for, in every layer group
        self.max_len = zeros()
        self.last_token = zeros()  # the newest known token
        self.watched = np.zeros(num_slots, np.bool_)  # each of its tokens may end it: stop ids or strings
        self.last_step_id: Int64 = np.full(num_slots, -1, np.int64)  # last sent plan that it was part of
        self.serial: Int64 = np.full(num_slots, -1, np.int64)  # tells apart those who hold it in turn

        self.closed: list[int] = []  # slots the shards still believe open; told with the next plan
        self._free = list(range(num_slots - 1, -1, -1))
        self.owners: dict[int, Request] = {}  # by slot, the longest-admitted first
        self._order: Int32 | None = None
        self._next_serial = 0

    @property
    def order(self) -> Int32:
        """The slots in use, the longest-admitted first."""
        if self._order is None:
            self._order = np.array(list(self.owners), np.int32)
        return self._order

    @property
    def num_free(self) -> int:
        return len(self._free)

    def open(self, request: Request, num_cached: int) -> int:
        """Give `request` a slot; its first `num_cached` tokens are computed and have blocks. The slot."""
        slot = self._free.pop()
        request.slot = slot
        self.num_known[slot] = request.num_tokens
        self.num_prefill[slot] = request.num_to_compute
        self.num_in_flight[slot] = 0
        self.num_computed[slot] = num_cached
        self.capacity[slot] = 0  # set once its tables have entries for its first chunk
        self.max_len[slot] = request.max_len
        self.watched[slot] = bool(request.sampling.stop or request.sampling.stop_token_ids)
        self.serial[slot] = self._next_serial
        self._next_serial += 1
        self.owners[slot] = request
        self._order = None
        return slot

    def release(self, request: Request) -> None:
        """Take the slot back; a plan sent later may open it for another request."""
        slot = request.slot
        request.last_step_id = int(self.last_step_id[slot])
        request.slot = -1
        self.serial[slot] = -1
        self.closed.append(slot)
        self._free.append(slot)
        del self.owners[slot]
        self._order = None

    def check_integrity(self, block_size: int) -> None:
        """Slots and running requests match, and no row has fewer blocks than tokens."""
        held = list(self.owners)
        assert sorted(held + self._free) == list(range(len(self.serial))), "a slot is lost or held twice"
        assert (self.serial[self._free] == -1).all(), "a free slot has a serial"
        serials = self.serial[held]
        assert (serials[:-1] < serials[1:]).all(), "the running requests are out of order"
        for slot, request in self.owners.items():
            assert request.slot == slot, f"{request.request_id} is in slot {slot} and says {request.slot}"
            assert self.num_known[slot] == request.num_tokens, f"{request.request_id}: token counts differ"
            num_entries = min(map(len, request.block_tables))
            assert self.capacity[slot] == num_entries * block_size, "capacity and blocks differ"
            assert 0 <= self.num_computed[slot] <= self.capacity[slot], "tokens without a block"
            num_tokens = self.num_known[slot] + self.num_in_flight[slot]
            assert self.num_computed[slot] <= num_tokens <= self.max_len[slot], "more tokens than allowed"

"""Short lists of numbers that slots have, all in one table: no list is padded to the longest."""

import numpy as np
import numpy.typing as npt

from ..coordinator.plan import Int32

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


class SlotEntries:
    """Entries of `width` numbers, any number of them a slot; on the host, ordered by slot."""

    def __init__(self, width: int) -> None:
        self._slots = np.empty(0, np.int64)
        self._values = np.empty((0, width), np.float64)

    def set(self, slot: int, values: Float64) -> None:
        """Replace the slot's entries by `values`, [entries, width]."""
        begin, end = np.searchsorted(self._slots, (slot, slot + 1))
        if begin == end and not len(values):
            return
        slots = np.full(len(values), slot)
        self._slots = np.concatenate((self._slots[:begin], slots, self._slots[end:]))
        self._values = np.concatenate((self._values[:begin], values, self._values[end:]))

    def of(self, slots: Int32) -> tuple[Int64, Float64]:
        """The entries of each of `slots`, one after the other: the place in `slots` [N], and the numbers [N, width]."""
        begin = np.searchsorted(self._slots, slots)
        counts = np.searchsorted(self._slots, slots, "right") - begin
        rows = np.repeat(np.arange(len(slots)), counts)
        places = np.arange(len(rows)) + (begin - (np.cumsum(counts) - counts))[rows]
        return rows, self._values[places]

    def pad_left(self, width: int, value: float) -> None:
        """Make entries `width` numbers wide, with `value` before those that are there."""
        self._values = np.pad(
            self._values, ((0, 0), (width - self._values.shape[1], 0)), constant_values=value
        )


def local_columns(token_ids: tuple[int, ...], vocab_rows: range) -> Int64:
    """The columns of those tokens that are among `vocab_rows`."""
    columns = np.asarray(token_ids, np.int64) - vocab_rows.start
    return columns[(columns >= 0) & (columns < len(vocab_rows))]

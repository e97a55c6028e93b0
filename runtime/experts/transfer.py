"""What a copy of an expert into its slot is, and who carries it out; and how fast copies are.

Decides nothing: which expert, which slot and when are the callers' business.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ...collect.schema import ExpertKey
from .cache import Kind, Slot


class Transfer(Protocol):
    """One copy in flight: a value to hold and wait on. All methods may be called by any thread."""

    key: ExpertKey
    slot: Slot
    nbytes: int
    kind: Kind

    @property
    def is_ordered(self) -> bool:
        """`wait` will not block: what a device is given from then on waits for the copy itself."""
        ...

    def done(self) -> bool:
        """True once nothing writes to the slot any more: complete, failed or cancelled."""
        ...

    def wait(self) -> None:
        """Block until done. Raises TransferError if the slot does not hold the expert's bytes."""
        ...

    def cancel(self) -> bool:
        """Take the copy out of the queue; False if it was started or is done. Does not block."""
        ...


class TransferEngine(Protocol):
    """Owner of copy threads or streams."""

    @property
    def degraded(self) -> bool:
        """Copies go on, but not as they should: a thread died."""
        ...

    def submit(self, key: ExpertKey, slot: Slot, kind: Kind) -> Transfer:
        """Queue a copy; on-demand copies overtake prefetches, piece by piece. Does not block.

        The slot belongs to the copy until it is done. What goes wrong is raised by `wait`; only
        an engine that was closed raises TransferError here.
        """
        ...

    def promote(self, transfer: Transfer) -> None:
        """A prefetch is needed now: what is left of it joins the end of the on-demand queue."""
        ...

    def used(self, slots: Sequence[Slot]) -> None:
        """Compute that reads these slots has been queued: whoever overwrites one waits for that.

        Called before the slots may be victims. Does not block; nothing where compute is done by
        then anyway.
        """
        ...

    def device_stall_s(self) -> float:
        """Seconds that a device's compute waited for copies and that were not told before.

        0.0 where the host waits.
        """
        ...

    def bandwidth(self) -> float:
        """Bytes a second while copying, averaged over the last second or so; 0.0: not known yet."""
        ...

    def outstanding_bytes(self) -> int:
        """Bytes submitted and not copied yet."""
        ...

    def close(self) -> None:
        """Fail what is queued, wait for what is being read; idempotent."""
        ...


class BandwidthMeter:
    """Bytes over the time in which at least one copy ran. Callers hold a lock."""

    WINDOW_S = 0.01
    MEMORY_S = 1.0

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._num_running = 0
        self._since = 0.0
        self._bytes = 0
        self._busy_s = 0.0
        self._rate = 0.0

    def start(self) -> None:
        now = self._clock()
        if self._num_running:
            self._busy_s += now - self._since
        self._since = now
        self._num_running += 1

    def stop(self, nbytes: int) -> None:
        now = self._clock()
        self._busy_s += now - self._since
        self._since = now
        self._num_running -= 1
        self._bytes += nbytes
        if self._busy_s >= self.WINDOW_S:
            rate = self._bytes / self._busy_s
            weight = 1.0 - math.exp(-self._busy_s / self.MEMORY_S) if self._rate else 1.0
            self._rate += (rate - self._rate) * weight
            self._bytes, self._busy_s = 0, 0.0

    def copied(self, nbytes: int, seconds: float) -> None:
        """A copy has run for so long, and was not started."""
        self._bytes += nbytes
        if not self._num_running:
            self._busy_s += seconds

    def rate(self) -> float:
        """Bytes a second; before the first window is full, what there is of it."""
        if self._rate or not self._busy_s:
            return self._rate
        return self._bytes / self._busy_s

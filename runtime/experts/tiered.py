"""Two steps to a slot: disk -> host cache -> link -> device slot, each expert by the shorter way.

Decides which experts stay in host memory and when a block goes over the link; moves no bytes and
knows no CUDA. One thread: the engine's.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from ...collect.schema import ExpertKey
from ..errors import TransferError
from .cache import ExpertCache, Kind, Lease, Slot
from .layout import ExpertSource
from .transfer import Transfer, TransferEngine

MIN_HOST_SLOTS = 8
"""A host cache below this could not keep disk and link busy at once: it is the staging ring too."""

MAX_AHEAD = 2
"""Prefetches on the link at a time. What is on it cannot be overtaken, so a miss waits for as many
copies at the most; two keep the link busy from one look of the engine to the next."""


MEMORY = 1 / 64
"""Weight of the newest copy in the share that has to be read from disk: it falls as the host cache
fills, and how fast copies are goes by it."""


class LinkCopy(Protocol):
    """A block on its way over the link."""

    def done(self) -> bool:
        """Whether it has arrived; does not block."""
        ...

    def join(self) -> None:
        """Let whatever computes next wait for it, without blocking the host."""
        ...

    def synchronize(self) -> None:
        """Block the host until it has arrived."""
        ...


class Link(Protocol):
    """Carries blocks from host slots to device slots, in order within a kind."""

    def copy(self, host_slot: Slot, slot: Slot, kind: Kind) -> LinkCopy:
        """Queue a copy that begins when the slot's last use and last copy are over."""
        ...

    def used(self, slots: Sequence[Slot]) -> None:
        """What reads these slots is queued by now: a later copy into them waits for it."""
        ...

    def stall_s(self) -> float:
        """Seconds that compute waited for copies, of waits that are over and were not told."""
        ...

    def bandwidth(self) -> float:
        """Bytes a second; 0.0 while unknown."""
        ...

    def close(self) -> None:
        """Wait for what is under way; idempotent."""
        ...


class TieredCopy:
    """TieredTransfer's Transfer: read from disk unless the host has it, then over the link."""

    def __init__(self, engine: "TieredTransfer", key: ExpertKey, slot: Slot, kind: Kind) -> None:
        self.key = key
        self.slot = slot
        self.kind = kind
        self.nbytes = 0
        self.error: TransferError | None = None
        self.reading: Transfer | None = None
        self.lease: Lease | None = None
        self.carried: LinkCopy | None = None
        self.is_urgent = kind is Kind.ON_DEMAND
        self.is_over = False
        self._engine = engine

    @property
    def is_ordered(self) -> bool:
        return self.is_over or self.carried is not None

    def done(self) -> bool:
        self._engine.pump()
        return self.is_over

    def wait(self) -> None:
        self._engine.bring(self)
        if self.error is not None:
            raise self.error
        if self.carried is not None:
            self.carried.join()

    def cancel(self) -> bool:
        return self._engine.cancel(self)


class TieredTransfer:
    """A transfer engine over a host cache. `disk` fills host slots, `link` device slots.

    The host cache keeps what its policy holds dear; what the device needs again is then one step
    away. Host slots are pinned while the link reads them, so it is the staging ring as well.
    """

    def __init__(
        self, disk: TransferEngine, link: Link, *, host: ExpertCache, source: ExpertSource
    ) -> None:
        self.host = host
        self.disk = disk
        self._link = link
        self._source = source
        self._waiting: deque[TieredCopy] = deque()  # no host slot, or no place on the link yet
        self._reading: list[TieredCopy] = []
        self._carried: list[TieredCopy] = []
        self._is_closed = False
        self.num_from_host = 0
        self.num_from_disk = 0
        self._disk_share = 0.0

    @property
    def degraded(self) -> bool:
        return self.disk.degraded

    def submit(self, key: ExpertKey, slot: Slot, kind: Kind) -> Transfer:
        if self._is_closed:
            raise TransferError(f"expert {key}: the transfer engine was closed")
        copy = TieredCopy(self, key, slot, kind)
        try:
            copy.nbytes = self._source.layout(key).bytes_read
        except Exception as error:
            self._fail(copy, TransferError(f"expert {key} has no bytes to copy: {error!r}"))
            return copy
        if copy.is_urgent:
            self._waiting.insert(self._num_urgent(), copy)
        else:
            self._waiting.append(copy)
        self.pump()
        return copy

    def promote(self, transfer: Transfer) -> None:
        if not isinstance(transfer, TieredCopy) or transfer.is_urgent:
            return
        if transfer.reading is not None:
            self.disk.promote(transfer.reading)
        if transfer in self._waiting:
            self._waiting.remove(transfer)
            self._waiting.insert(self._num_urgent(), transfer)
        transfer.is_urgent = True
        self.pump()

    def used(self, slots: Sequence[Slot]) -> None:
        self._link.used(slots)

    def device_stall_s(self) -> float:
        return self._link.stall_s()

    def bandwidth(self) -> float:
        """Of the way as it was of late: the link always, the disk for the share it had to serve."""
        link, disk = self._link.bandwidth(), self.disk.bandwidth()
        if not link or (self.num_from_disk and not disk):
            return 0.0
        slowness = 1.0 / link
        if self.num_from_disk:
            slowness += self._disk_share / disk
        return 1.0 / slowness

    def outstanding_bytes(self) -> int:
        self.pump()
        return sum(one.nbytes for one in (*self._waiting, *self._reading, *self._carried))

    def close(self) -> None:
        self._is_closed = True
        for copy in list(self._waiting):
            self._fail(copy, TransferError(f"expert {copy.key}: the transfer engine was closed"))
        self.disk.close()
        for copy in list(self._reading):
            self._end_reading(copy)
            self._fail(copy, TransferError(f"expert {copy.key}: the transfer engine was closed"))
        for copy in list(self._carried):
            assert copy.carried is not None
            copy.carried.synchronize()
            self._arrived(copy)
        self._link.close()

    def pump(self) -> None:
        """Move on what can be moved on, without blocking."""
        for copy in [one for one in self._carried if one.carried and one.carried.done()]:
            self._arrived(copy)
        for copy in [one for one in self._reading if one.reading and one.reading.done()]:
            self._end_reading(copy)
        for copy in list(self._waiting):
            self._advance(copy)

    def bring(self, copy: TieredCopy) -> None:
        """Block until the copy is on the link, failed or over: disk is awaited, the link is not."""
        self.promote(copy)
        while not copy.is_over and copy.carried is None:
            self.pump()
            if copy.is_over or copy.carried is not None:
                return
            if copy.reading is not None:
                self._end_reading(copy, blocks=True)
            elif self._carried:
                # Host slots are pinned by the link, or reads of others hold them.
                oldest = self._carried[0]
                assert oldest.carried is not None
                oldest.carried.synchronize()
            elif self._reading:
                self._end_reading(self._reading[0], blocks=True)
            else:
                raise AssertionError("a copy waits although neither disk nor link is busy")

    def cancel(self, copy: TieredCopy) -> bool:
        """Take a copy out before the link has it; a read of it under way goes on for the host."""
        if copy.is_over or copy.carried is not None:
            return False
        if copy in self._reading:
            assert copy.reading is not None
            if not copy.reading.cancel():
                return False
            self._end_reading(copy)
        if not copy.is_over:
            self._fail(copy, TransferError(f"expert {copy.key}: the copy was cancelled"))
        return True

    def _remember_way(self, *, is_from_disk: bool) -> None:
        weight = max(MEMORY, 1.0 / (self.num_from_host + self.num_from_disk))
        self._disk_share += (is_from_disk - self._disk_share) * weight

    def _num_urgent(self) -> int:
        return sum(one.is_urgent for one in self._waiting)

    def _advance(self, copy: TieredCopy) -> None:
        if self.host.lookup(copy.key) is not None:
            self._carry(copy)
            return
        if self.host.state(copy.key) is not None:
            return  # another copy reads it; its bytes will do
        host_slot = self.host.reserve(copy.key, Kind.ON_DEMAND)
        if host_slot is None:
            return
        self.num_from_disk += 1
        self._remember_way(is_from_disk=True)
        self._waiting.remove(copy)
        try:
            kind = Kind.ON_DEMAND if copy.is_urgent else Kind.PREFETCH
            copy.reading = self.disk.submit(copy.key, host_slot, kind)
        except TransferError as error:
            self.host.abandon(host_slot)
            self._fail(copy, error)
            return
        self._reading.append(copy)

    def _carry(self, copy: TieredCopy) -> None:
        num_ahead = sum(not one.is_urgent for one in self._carried)
        if not copy.is_urgent and num_ahead >= MAX_AHEAD:
            return
        if copy.reading is None:
            self.num_from_host += 1
            self._remember_way(is_from_disk=False)
        self.host.record_use(copy.key)
        copy.lease = self.host.pin([copy.key])
        self._waiting.remove(copy)
        kind = Kind.ON_DEMAND if copy.is_urgent else Kind.PREFETCH
        try:
            copy.carried = self._link.copy(copy.lease.slots[copy.key], copy.slot, kind)
        except IndexError as error:
            copy.lease.release()
            self._fail(copy, TransferError(f"expert {copy.key} has nowhere to go: {error}"))
            return
        self._carried.append(copy)

    def _end_reading(self, copy: TieredCopy, *, blocks: bool = False) -> None:
        reading = copy.reading
        assert reading is not None
        if not blocks and not reading.done():
            return
        self._reading.remove(copy)
        try:
            reading.wait()
        except TransferError as error:
            self.host.abandon(reading.slot)
            self._fail(copy, error)
            return
        self.host.commit(reading.slot)
        if self._is_closed:
            return
        self._waiting.insert(self._num_urgent() if copy.is_urgent else 0, copy)
        self._advance(copy)

    def _arrived(self, copy: TieredCopy) -> None:
        self._carried.remove(copy)
        copy.is_over = True
        if copy.lease is not None:
            copy.lease.release()

    def _fail(self, copy: TieredCopy, error: TransferError) -> None:
        copy.error = error
        copy.is_over = True
        if copy in self._waiting:
            self._waiting.remove(copy)

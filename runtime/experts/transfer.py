"""Copies experts into slots: what a copy is, who carries it out, and the disk -> RAM threads.

Decides nothing: which expert, which slot and when are the callers' business.
"""

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from types import TracebackType
from typing import Protocol, Self

import xxhash

from ...collect.schema import ExpertKey
from ..errors import TransferError
from .cache import Kind, Slot
from .layout import BLOCK_ALIGN, ExpertLayout, ExpertSource
from .pieces import Halt, split_extents
from .reader import FileReader, ReadPlan, bounce_buffer

logger = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20
"""A read of 1 MiB reaches a local disk's full rate; a miss waits for at most one of them."""

MAX_RUN = 4
"""Pieces that a thread reads without asking what else there is to do: 4 ms of a disk."""

MAX_PLANS = 1024
"""Experts of which the pieces are remembered: a few KiB each."""


class Transfer(Protocol):
    """One copy in flight: a value to hold and wait on. All methods may be called by any thread."""

    key: ExpertKey
    slot: Slot
    nbytes: int
    kind: Kind

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

    def bandwidth(self) -> float:
        """Bytes a second while copying, averaged over the last second or so; 0.0: not known yet."""
        ...

    def outstanding_bytes(self) -> int:
        """Bytes submitted and not copied yet."""
        ...

    def close(self) -> None:
        """Fail what is queued, wait for what is being read; idempotent."""
        ...


class SlotBlocks(Protocol):
    """What ThreadTransfer needs of a SlotArena: writable bytes by slot."""

    def block(self, slot: Slot) -> memoryview: ...


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

    def rate(self) -> float:
        """Bytes a second; before the first window is full, what there is of it."""
        if self._rate or not self._busy_s:
            return self._rate
        return self._bytes / self._busy_s


class _Copy:
    """ThreadTransfer's Transfer. Everything but the event is guarded by the engine's lock."""

    def __init__(self, engine: "ThreadTransfer", key: ExpertKey, slot: Slot, *, kind: Kind) -> None:
        self.key = key
        self.slot = slot
        self.kind = kind
        self.nbytes = 0
        self.engine = engine
        self.layout: ExpertLayout | None = None
        self.target = memoryview(b"")
        self.plan = ReadPlan(())
        # Pieces that nobody reads yet, by their place in the plan.
        self.pending: deque[range] = deque()
        self.num_reading = 0
        self.is_started = False
        self.error: TransferError | None = None
        self.finished = threading.Event()

    def take(self, num_sharers: int) -> range:
        """The next pieces for one of several threads that share what is left."""
        num_left = sum(map(len, self.pending))
        first = self.pending.popleft()
        count = min(-(-num_left // num_sharers), MAX_RUN)
        if count < len(first):
            self.pending.appendleft(first[count:])
        return first[:count]

    def size(self, pieces: Iterable[int]) -> int:
        """Bytes of these pieces."""
        return sum(self.plan.pieces[index].length for index in pieces)

    def done(self) -> bool:
        return self.finished.is_set()

    def wait(self) -> None:
        self.finished.wait()
        if self.error is not None:
            raise self.error

    def cancel(self) -> bool:
        return self.engine._cancel(self)


class ThreadTransfer:
    """Reads experts from disk into the slots of a CPU arena with `num_threads` copy threads.

    Several threads share the pieces of one copy, in runs; one of a prefetch ends before its next
    piece when a miss comes. `direct` as in FileReader. `verify` checks each
    copy against the source's checksum where it has one. A copy thread that dies fails the copy it
    was reading and sets `degraded`; when none is left, on-demand copies run in `submit` and
    prefetches fail. `close` waits for reads that are under way.
    """

    def __init__(
        self,
        source: ExpertSource,
        arena: SlotBlocks,
        *,
        num_threads: int = 2,
        piece_bytes: int = PIECE_BYTES,
        direct: bool | None = None,
        verify: bool = False,
    ) -> None:
        if num_threads < 1 or piece_bytes < BLOCK_ALIGN or piece_bytes % BLOCK_ALIGN:
            raise ValueError(
                f"{num_threads} copy threads with pieces of {piece_bytes} bytes: at least one "
                f"thread is needed, and pieces are a multiple of {BLOCK_ALIGN} bytes"
            )
        self.degraded = False
        self._source = source
        self._arena = arena
        self._piece_bytes = piece_bytes
        self._verify = verify
        self._stopping = threading.Event()
        self._reader = FileReader(direct=direct, stopping=self._stopping)
        self._changed = threading.Condition()
        # Ends runs of pieces early: those of prefetches where misses wait, all when closing.
        self._halt, self._halt_prefetch = Halt(0), Halt(0)
        self._on_demand: OrderedDict[_Copy, None] = OrderedDict()
        self._prefetch: OrderedDict[_Copy, None] = OrderedDict()
        self._meter = BandwidthMeter()
        self._outstanding_bytes = 0
        self._describe = lru_cache(MAX_PLANS)(self._described)
        self._num_sharers = self._num_alive = num_threads
        self._threads = [
            threading.Thread(target=self._work, name=f"outrider-copy-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, key: ExpertKey, slot: Slot, kind: Kind) -> Transfer:
        copy = _Copy(self, key, slot, kind=kind)
        try:
            copy.target = self._arena.block(slot)
            copy.layout, copy.plan = self._describe(key)
            copy.pending.append(range(len(copy.plan.pieces)))
            copy.nbytes = copy.layout.bytes_read
        except Exception as error:
            copy.error = TransferError(f"expert {key} has no bytes to copy: {error!r}")
        with self._changed:
            if self._stopping.is_set():
                raise TransferError(f"expert {key}: the transfer engine was closed")
            self._outstanding_bytes += copy.nbytes
            must_run_here = not self._num_alive
            if must_run_here and kind is Kind.PREFETCH:
                self._drop(copy, "no copy thread is alive")
            elif copy.error is None and not must_run_here:
                queue = self._on_demand if kind is Kind.ON_DEMAND else self._prefetch
                queue[copy] = None
                self._hurry()
                self._changed.notify(len(copy.plan.pieces))
                return copy
        if must_run_here and copy.error is None:
            self._run_here(copy)
        copy.finished.set()
        return copy

    def promote(self, transfer: Transfer) -> None:
        with self._changed:
            if isinstance(transfer, _Copy) and transfer in self._prefetch:
                del self._prefetch[transfer]
                self._on_demand[transfer] = None
                self._hurry()

    def used(self, slots: Sequence[Slot]) -> None:
        """Nothing: the CPU has computed by the time that it tells."""

    def bandwidth(self) -> float:
        with self._changed:
            return self._meter.rate()

    def outstanding_bytes(self) -> int:
        with self._changed:
            return self._outstanding_bytes

    def close(self) -> None:
        with self._changed:
            self._stopping.set()
            self._halt.value = self._halt_prefetch.value = 1
            self._fail_queued("the transfer engine was closed")
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _work(self) -> None:
        try:
            bounce = bounce_buffer(self._piece_bytes)
            while (taken := self._take()) is not None:
                self._read(*taken, bounce)
        except BaseException:
            logger.exception("a copy thread died; what it was reading is lost")
        finally:
            with self._changed:
                self._num_alive -= 1
                self.degraded |= not self._stopping.is_set()
                if not self._num_alive:
                    self._fail_queued("the last copy thread died")

    def _described(self, key: ExpertKey) -> tuple[ExpertLayout, ReadPlan]:
        layout = self._source.layout(key)
        pieces = split_extents(layout.extents, self._piece_bytes)
        if not pieces:
            raise ValueError("its layout has no extents")
        return layout, ReadPlan(pieces)

    def _hurry(self) -> None:
        """Runs of prefetches end early exactly while a miss has pieces that nobody reads."""
        is_urgent = any(copy.pending for copy in self._on_demand)
        self._halt_prefetch.value = is_urgent or self._stopping.is_set()

    def _take(self) -> tuple[_Copy, range, Halt] | None:
        with self._changed:
            while True:
                for queue, halt in (
                    (self._on_demand, self._halt),
                    (self._prefetch, self._halt_prefetch),
                ):
                    copy = next((copy for copy in queue if copy.pending), None)
                    if copy is not None:
                        return copy, self._start(copy), halt
                if self._stopping.is_set():
                    return None
                self._changed.wait()

    def _start(self, copy: _Copy) -> range:
        run = copy.take(self._num_sharers)
        copy.is_started = True
        copy.num_reading += 1
        self._meter.start()
        self._hurry()
        return run

    def _read(self, copy: _Copy, run: range, halt: Halt, bounce: memoryview) -> None:
        """Read a run of pieces; whoever ends the last one of a copy ends the copy."""
        problem: str | None = "the copy thread died"
        count = 0
        try:
            count = self._reader.read_run(
                copy.plan, run, slot=copy.target, bounce=bounce, halt=halt
            )
            problem = None
        except Exception as error:
            problem = str(error) if isinstance(error, TransferError) else repr(error)
        except BaseException:
            # Set before whoever waits for this copy wakes up and asks.
            self.degraded = True
            raise
        finally:
            with self._changed:
                is_last = self._ended(copy, run, count, problem)
            if is_last:
                self._finish(copy)

    def _ended(self, copy: _Copy, run: range, count: int, problem: str | None) -> bool:
        """`count` pieces of a run were read; true if nobody reads the copy any more. The lock is
        held."""
        self._meter.stop(copy.size(run[:count]))
        copy.num_reading -= 1
        self._outstanding_bytes -= copy.size(run[:count])
        if count < len(run):
            copy.pending.appendleft(run[count:])
            if self._stopping.is_set():
                problem = problem or "the transfer engine was closed"
        if problem or copy.error is not None:
            self._drop(copy, problem or "")
        is_last = not copy.pending and not copy.num_reading
        if is_last:
            self._on_demand.pop(copy, None)
            self._prefetch.pop(copy, None)
        elif copy.pending:
            self._hurry()
            self._changed.notify()
        return is_last

    def _finish(self, copy: _Copy) -> None:
        try:
            if self._verify and copy.error is None:
                self._check(copy)
        except Exception as error:
            copy.error = TransferError(f"expert {copy.key}: {error}")
        finally:
            copy.finished.set()

    def _check(self, copy: _Copy) -> None:
        expected = self._source.checksum(copy.key)
        if expected is None or copy.layout is None:
            return
        digest = xxhash.xxh3_64()
        for extent in copy.layout.extents:
            digest.update(copy.target[extent.slot_offset : extent.slot_offset + extent.length])
        if digest.intdigest() != expected:
            files = ", ".join(sorted({str(extent.file) for extent in copy.layout.extents}))
            raise TransferError(
                f"checksum {digest.intdigest():016x} instead of {expected:016x} in {files}: "
                "the weights are damaged"
            )

    def _run_here(self, copy: _Copy) -> None:
        bounce = bounce_buffer(self._piece_bytes)
        while copy.pending:
            with self._changed:
                run = self._start(copy)
            self._read(copy, run, self._halt, bounce)

    def _cancel(self, copy: _Copy) -> bool:
        with self._changed:
            if copy.is_started or copy.finished.is_set():
                return False
            self._drop(copy, "the copy was cancelled")
            copy.finished.set()
            return True

    def _drop(self, copy: _Copy, problem: str) -> None:
        """Fail a copy and forget the pieces that nobody reads yet. The lock is held."""
        if copy.error is None:
            copy.error = TransferError(f"expert {copy.key}: {problem}")
        self._on_demand.pop(copy, None)
        self._prefetch.pop(copy, None)
        self._outstanding_bytes -= sum(map(copy.size, copy.pending))
        copy.pending.clear()
        self._hurry()

    def _fail_queued(self, problem: str) -> None:
        for copy in [*self._on_demand, *self._prefetch]:
            if copy.pending:
                self._drop(copy, problem)
                if not copy.num_reading:
                    copy.finished.set()

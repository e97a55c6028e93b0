"""Copies experts from disk into slots in RAM with threads: in which order, and what goes wrong.

Decides nothing else: which expert, which slot and when are the callers' business.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from types import TracebackType
from typing import Protocol, Self

import xxhash

from ...collect.schema import ExpertKey
from ..errors import TransferError
from .cache import Kind, Slot
from .layout import BLOCK_ALIGN, ExpertLayout, ExpertSource
from .pieces import Halt, split_extents
from .reader import FileReader, PieceReader, ReadPlan, bounce_buffer
from .transfer import BandwidthMeter, Transfer

logger = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20
"""A read of 1 MiB reaches a local disk's full rate; a miss waits for at most one of them."""

MAX_RUN = 4
"""Pieces that a thread reads without asking what else there is to do: 4 ms of a disk."""

MAX_PLANS = 1024
"""Experts of which the pieces are remembered: a few KiB each."""


class SlotBlocks(Protocol):
    """What ThreadTransfer needs of a SlotArena: writable bytes by slot."""

    def block(self, slot: Slot) -> memoryview: ...


class _Copy:
    """ThreadTransfer's Transfer. Everything but the event is guarded by the engine's lock."""

    def __init__(self, engine: "ThreadTransfer", key: ExpertKey, slot: Slot, *, kind: Kind) -> None:
        self.key = key
        self.slot = slot
        self.kind = kind
        self.is_ordered = False
        self.nbytes = 0
        self.engine = engine
        self.layout: ExpertLayout | None = None
        self.target = memoryview(b"")
        self.plan = ReadPlan(())
        self.pending: deque[range] = deque()  # places in the plan that nobody reads yet
        self.num_left = 0
        self.num_reading = 0
        self.is_started = False
        # Read by whoever waits for it, or was until an interrupt: then begun again.
        self.is_callers = False
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
        while not self.finished.is_set():
            if not self.engine._help(self):
                self.finished.wait()
        if self.error is not None:
            raise self.error

    def cancel(self) -> bool:
        return self.engine._cancel(self)


class ThreadTransfer:
    """Reads experts from disk into the slots of a CPU arena with `num_threads` copy threads.

    Several threads share the pieces of one copy, in runs; one of a prefetch ends before its next
    piece when a miss comes. Small misses that no thread has begun are read by whoever waits, which
    takes less than waking a thread. `direct` as in FileReader. `verify` checks each
    copy against the source's checksum where it has one. A copy thread that dies fails the copy it
    was reading and sets `degraded`; when none is left, on-demand copies run in `submit` and
    prefetches fail. `close` waits for reads that are under way. `reader` may be replaced while no
    copy is in flight.
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
        self.reader: PieceReader = FileReader(direct=direct, stopping=self._stopping)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # Held by the one thread that reads while it waits, for `bounce`.
        self._calling = threading.Lock()
        self._bounce = bounce_buffer(piece_bytes)
        # Ends runs of pieces early: those of prefetches where misses wait, all when closing.
        self._halt, self._halt_prefetch = Halt(0), Halt(0)
        self._on_demand: OrderedDict[_Copy, None] = OrderedDict()
        self._prefetch: OrderedDict[_Copy, None] = OrderedDict()
        self._meter = BandwidthMeter()
        # Of no method of this object: a cycle would keep its buffers until the collector comes.
        self._describe = lru_cache(MAX_PLANS)(partial(_described, source, piece_bytes))
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
            copy.nbytes = copy.num_left = copy.layout.bytes_read
        except Exception as error:
            copy.error = TransferError(f"expert {key} has no bytes to copy: {error!r}")
        with self._lock:
            if self._stopping.is_set():
                raise TransferError(f"expert {key}: the transfer engine was closed")
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
            with self._calling:
                self._read_here(copy)
        copy.finished.set()
        return copy

    def promote(self, transfer: Transfer) -> None:
        with self._lock:
            if isinstance(transfer, _Copy) and transfer in self._prefetch:
                del self._prefetch[transfer]
                self._on_demand[transfer] = None
                self._hurry()

    def used(self, slots: Sequence[Slot]) -> None:
        """Nothing: the CPU has computed by the time that it tells."""

    def device_stall_s(self) -> float:
        return 0.0

    def bandwidth(self) -> float:
        with self._lock:
            return self._meter.rate()

    def outstanding_bytes(self) -> int:
        with self._lock:
            return sum(copy.num_left for copy in (*self._on_demand, *self._prefetch))

    def close(self) -> None:
        with self._lock:
            self._stopping.set()
            self._halt.value = self._halt_prefetch.value = 1
            self._fail_queued("the transfer engine was closed")
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        with self._calling:
            self.reader.close()
            # An error that somebody keeps keeps its copy, and that this.
            self._bounce = memoryview(b"")

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
            with self._lock:
                self._num_alive -= 1
                self.degraded |= not self._stopping.is_set()
                if not self._num_alive:
                    self._fail_queued("the last copy thread died")

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
            count = self.reader.read_run(copy.plan, run, slot=copy.target, bounce=bounce, halt=halt)
            problem = None
        except Exception as error:
            problem = str(error) if isinstance(error, TransferError) else repr(error)
        except BaseException:
            # Set before whoever waits for this copy wakes up and asks.
            self.degraded = True
            raise
        finally:
            with self._lock:
                is_last = self._ended(copy, run, count, problem)
            if is_last:
                self._finish(copy)

    def _ended(self, copy: _Copy, run: range, count: int, problem: str | None) -> bool:
        """`count` pieces of a run were read; true if nobody reads the copy any more. The lock is
        held."""
        nbytes = copy.size(run[:count])
        self._meter.stop(nbytes)
        copy.num_reading -= 1
        copy.num_left -= nbytes
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

    def _help(self, wanted: _Copy) -> bool:
        """Read a small copy that is needed, `wanted` first; False if nobody has to. Blocks on the
        disk."""
        with self._calling:
            copy = self._claim(wanted)
            if copy is None:
                return False
            self._read_here(copy)
            return True

    def _claim(self, wanted: _Copy) -> _Copy | None:
        with self._lock:
            for copy in (wanted, *self._on_demand):
                is_free = copy in self._on_demand and not copy.is_started
                is_small = len(copy.plan.pieces) == 1
                was_mine = copy is wanted and copy.is_callers
                if was_mine and (copy.num_reading or copy.finished.is_set()):
                    continue
                if was_mine or (is_free and is_small):
                    # In this order, and read as a whole: an interrupt may come at any point.
                    copy.is_callers = copy.is_started = True
                    self._on_demand.pop(copy, None)
                    self._hurry()
                    return copy
        return None

    def _read_here(self, copy: _Copy) -> None:
        """Read all of a copy that no thread will begin. An interrupt leaves it to the next wait."""
        began = time.perf_counter()
        problem, count, run = None, 0, range(len(copy.plan.pieces))
        try:
            count = self.reader.read_run(
                copy.plan, run, slot=copy.target, bounce=self._bounce, halt=self._halt
            )
        except Exception as error:
            problem = str(error) if isinstance(error, TransferError) else repr(error)
        if count < len(run):
            problem = problem or "the transfer engine was closed"
        with self._lock:
            if problem:
                self._drop(copy, problem)
            else:
                self._meter.copied(copy.nbytes, time.perf_counter() - began)
        self._finish(copy)

    def _cancel(self, copy: _Copy) -> bool:
        with self._lock:
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
        copy.pending.clear()
        self._hurry()

    def _fail_queued(self, problem: str) -> None:
        for copy in [*self._on_demand, *self._prefetch]:
            if copy.pending:
                self._drop(copy, problem)
                if not copy.num_reading:
                    copy.finished.set()


def _described(
    source: ExpertSource, piece_bytes: int, key: ExpertKey
) -> tuple[ExpertLayout, ReadPlan]:
    layout = source.layout(key)
    pieces = split_extents(layout.extents, piece_bytes)
    if not pieces:
        raise ValueError("its layout has no extents")
    return layout, ReadPlan(pieces)

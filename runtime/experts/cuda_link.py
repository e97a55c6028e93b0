"""Host to CUDA device: the one file of copies that has CUDA in it.

Streams, events and nothing else: what goes when, and what stays in host memory, is `tiered`'s.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import DeviceLostError
from .cache import Kind, Slot
from .slots import SlotArena

URGENT_PRIORITY = -1
"""Lower is more urgent; a device without priorities takes it for 0."""

PIECE_BYTES = 4 << 20
"""Of a prefetch; a launch of less costs more of the host than it takes of the link."""

MEMORY = 0.2


class CudaCopy:
    """One block's copy: an event before its first piece and one behind its last."""

    def __init__(self, link: "CudaLink", began: Any, ready: Any, *, nbytes: int) -> None:
        self._link = link
        self._began = began
        self._ready = ready
        self._nbytes = nbytes
        self._is_done = False

    def done(self) -> bool:
        if not self._is_done and self._link.guard(self._ready.query):
            self._is_done = True
            elapsed_ms = self._link.guard(lambda: self._began.elapsed_time(self._ready))
            self._link.measure(self._nbytes, elapsed_ms / 1e3)
        return self._is_done

    def join(self) -> None:
        if not self._is_done:
            self._link.guard(lambda: self._link.wait(self._ready))

    def synchronize(self) -> None:
        self._link.guard(self._ready.synchronize)
        self.done()


class CudaLink:
    """Copies blocks of a pinned host arena into slots of a device arena.

    One stream for what is needed now and one for prefetches, both apart from the one that computes.
    Two events a slot order them without the host: a copy waits for the slot's last use and its last
    copy, compute waits for `ready`. Blocks go in pieces, so that the other stream's can go between.
    Slots never move, so kernels and graphs may keep their addresses. `cuda` is torch.cuda.
    """

    def __init__(self, host: SlotArena, arena: SlotArena, *, cuda: Any = torch.cuda) -> None:
        self._host = host
        self._arena = arena
        self._cuda = cuda
        device = arena.device
        # torch looks a device's number up anew at every call that is not given the number.
        self._index = cuda.current_device() if device.index is None else device.index
        self._streams = {
            Kind.ON_DEMAND: cuda.Stream(device, priority=URGENT_PRIORITY),
            Kind.PREFETCH: cuda.Stream(device, priority=0),
        }
        self._waits: deque[tuple[Any, Any]] = deque()
        self._last_use: dict[Slot, Any] = {}
        self._last_copy: dict[Slot, Any] = {}
        self._rate = 0.0

    def compute_stream(self) -> Any:
        """The stream on which kernels are queued now."""
        return self._cuda.current_stream(self._index)

    def copy(self, host_slot: Slot, slot: Slot, kind: Kind) -> CudaCopy:
        return self.guard(lambda: self._copy(host_slot, slot, kind))

    def _copy(self, host_slot: Slot, slot: Slot, kind: Kind) -> CudaCopy:
        stream = self._streams[kind]
        for events in (self._last_use, self._last_copy):
            if slot in events:
                stream.wait_event(events[slot])
        source, target = self._host.bytes_of(host_slot), self._arena.bytes_of(slot)
        began, ready = (self._cuda.Event(enable_timing=True) for _ in range(2))
        with self._cuda.stream(stream):
            began.record(stream)
            # Nothing is more urgent than what is needed now, so that goes in one piece.
            size = PIECE_BYTES if kind is Kind.PREFETCH else len(source)
            for start in range(0, len(source), size):
                piece = slice(start, start + size)
                target[piece].copy_(source[piece], non_blocking=True)
        ready.record(stream)
        self._last_copy[slot] = ready
        return CudaCopy(self, began, ready, nbytes=len(source))

    def wait(self, ready: Any) -> None:
        """Have what is queued from now on wait for `ready`, and remember when it came to that."""
        compute = self.compute_stream()
        reached = self._cuda.Event(enable_timing=True)
        reached.record(compute)
        compute.wait_event(ready)
        self._waits.append((reached, ready))

    def stall_s(self) -> float:
        return self.guard(self._stall_s)

    def _stall_s(self) -> float:
        stall_ms = 0.0
        while self._waits and all(event.query() for event in self._waits[0]):
            reached, ready = self._waits.popleft()
            stall_ms += max(0.0, reached.elapsed_time(ready))
        return stall_ms / 1e3

    def used(self, slots: Sequence[Slot]) -> None:
        if not slots:
            return
        event = self._cuda.Event()
        self.guard(lambda: event.record(self.compute_stream()))
        for slot in slots:
            self._last_use[slot] = event

    def bandwidth(self) -> float:
        return self._rate

    def measure(self, nbytes: int, seconds: float) -> None:
        """A copy took so long on the device, what it waited for not counted."""
        rate = nbytes / max(seconds, 1e-9)
        self._rate += (rate - self._rate) * (MEMORY if self._rate else 1.0)

    def close(self) -> None:
        for stream in self._streams.values():
            self.guard(stream.synchronize)

    def guard(self, call: Any) -> Any:
        """Run `call`. An error of the device is of some earlier work and ends its context."""
        try:
            return call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise DeviceLostError(
                f"{self._arena.device} failed ({error}); nothing on it can be trusted any more: "
                "start again, and if it happens again, look for driver and hardware faults"
            ) from error

"""A link on a virtual clock: copies take the time that their bytes take, and nothing is copied.

A transfer engine for replay. The link sends one copy at a time; on-demand copies overtake
prefetches at the end of the piece under way, as ThreadTransfer does. What was sent arrives a
latency later, and the next one is sent meanwhile: a disk that is asked by several threads, and
copies queued on a stream, take their latencies at the same time and their bytes one after the
other.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence

from ..collect.schema import ExpertKey
from ..runtime.errors import TransferError
from ..runtime.experts.cache import Kind, Slot
from ..runtime.experts.thread_transfer import PIECE_BYTES
from ..runtime.experts.transfer import BandwidthMeter, Transfer
from ..runtime.testing import VirtualClock


class VirtualCopy:
    """VirtualLink's Transfer. `wait` lets the clock run on until the copy is complete."""

    __slots__ = ("_link", "began_s", "ended_s", "is_cancelled", "is_done", "is_started", "key",
                 "kind", "left_s", "nbytes", "slot")  # fmt: skip
    is_ordered = False

    def __init__(self, link: "VirtualLink", key: ExpertKey, slot: Slot, *, kind: Kind) -> None:
        self.key = key
        self.slot = slot
        self.kind = kind
        self.nbytes = link.nbytes
        self.left_s = link.send_s
        self.began_s = self.ended_s = 0.0
        self.is_started = False
        self.is_done = False
        self.is_cancelled = False
        self._link = link

    def done(self) -> bool:
        if not self.is_done and self._link.is_behind:
            self._link.catch_up()
        return self.is_done

    def wait(self) -> None:
        while not self.done():
            self._link.run_to_next_end()
        if self.is_cancelled:
            raise TransferError(f"expert {self.key}: the copy was cancelled")

    def cancel(self) -> bool:
        return self._link.cancel(self)


class VirtualLink:
    """Every copy is `nbytes` at `bytes_per_s`, and there `latency_s` after it was sent; single
    thread, never blocks.

    `copied` counts the copies completed by kind, as they were submitted. ValueError for a link that
    carries nothing.
    """

    def __init__(
        self,
        clock: VirtualClock,
        *,
        nbytes: int,
        bytes_per_s: float,
        latency_s: float = 0.0,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        if nbytes < 1 or not bytes_per_s > 0.0 or latency_s < 0.0 or piece_bytes < 1:
            raise ValueError(
                f"a link of {bytes_per_s} bytes/s with {latency_s} s latency for copies of "
                f"{nbytes} bytes in pieces of {piece_bytes}: sizes and rate are above 0"
            )
        self.degraded = False
        self.nbytes = nbytes
        self.send_s = nbytes / bytes_per_s
        self.latency_s = latency_s
        self.copied = {Kind.ON_DEMAND: 0, Kind.PREFETCH: 0}
        self._piece_s = piece_bytes / bytes_per_s
        self._clock = clock
        # All that was sent up to this time is accounted for.
        self._at = 0.0
        self._event_s = 0.0
        self._meter = BandwidthMeter(clock=lambda: self._event_s)
        self._on_demand: OrderedDict[VirtualCopy, None] = OrderedDict()
        self._prefetch: OrderedDict[VirtualCopy, None] = OrderedDict()
        # Sent and not there yet, in order; `ended_s` is when they are.
        self._arriving: deque[VirtualCopy] = deque()
        # A prefetch whose piece was under way when it was overtaken, and when that piece ends.
        self._piece: VirtualCopy | None = None
        self._piece_left_s = 0.0
        self._is_held = False
        self._is_closed = False

    @property
    def is_behind(self) -> bool:
        """The clock has run on since the last account."""
        return self._at < self._clock.now

    def submit(self, key: ExpertKey, slot: Slot, kind: Kind) -> Transfer:
        if self._is_closed:
            raise TransferError(f"expert {key}: the transfer engine was closed")
        self.catch_up()
        copy = VirtualCopy(self, key, slot, kind=kind)
        if kind is Kind.ON_DEMAND:
            self._overtake()
            self._on_demand[copy] = None
        else:
            self._prefetch[copy] = None
        return copy

    def promote(self, transfer: Transfer) -> None:
        self.catch_up()
        if isinstance(transfer, VirtualCopy) and transfer in self._prefetch:
            self._overtake()
            del self._prefetch[transfer]
            self._on_demand[transfer] = None

    def hold(self) -> None:
        """Begin no copy before `release`, what is under way goes on: who submits keeps the threads
        that copy from beginning as long as it is busy with that.
        """
        self.catch_up()
        self._is_held = True

    def release(self) -> None:
        """Go on beginning copies."""
        self.catch_up()
        self._is_held = False

    def used(self, slots: Sequence[Slot]) -> None:
        """Nothing: what is computed is time only."""

    def device_stall_s(self) -> float:
        """None: there is no device."""
        return 0.0

    def bandwidth(self) -> float:
        """Bytes a second as an engine measures them: 0 before the first copy, latency included
        where nothing else was under way meanwhile.
        """
        self.catch_up()
        return self._meter.rate()

    def outstanding_bytes(self) -> int:
        """Bytes that are not sent yet, and copies that are on their way."""
        self.catch_up()
        left_s = sum(copy.left_s for copy in (*self._on_demand, *self._prefetch))
        return round(left_s / self.send_s * self.nbytes) + len(self._arriving) * self.nbytes

    def close(self) -> None:
        self._is_closed = True
        for copy in [*self._on_demand, *self._prefetch, *self._arriving]:
            self._end(copy, is_cancelled=True)

    def cancel(self, copy: VirtualCopy) -> bool:
        """Take a copy out of the queue; False once any of its bytes moved."""
        self.catch_up()
        if copy.is_started or copy.is_done:
            return False
        self._end(copy, is_cancelled=True)
        return True

    def arrivals(self, count: int, begun_s: float = 0.0) -> list[float]:
        """When `count` copies arrive that begin at `begun_s`, where nothing else is to do."""
        there_s = begun_s + self.latency_s
        return [there_s + index * self.send_s for index in range(1, count + 1)]

    def catch_up(self) -> None:
        """Account for what the link did up to the clock's time."""
        now = self._clock.now
        if not (self._on_demand or self._prefetch or self._arriving):
            self._at = max(self._at, now)
            return
        while self._at < now:
            self._begin()
            event_s = self._next_event()
            if event_s > now:
                self._send(now, is_end=False)
                return
            self._happen(event_s)

    def run_to_next_end(self) -> None:
        """Let the clock run on until something was sent, or arrives."""
        self.catch_up()
        event_s = self._next_event()
        if event_s == float("inf"):
            raise TransferError("nothing is being copied, so nothing can be waited for")
        self._begin()
        self._clock.now = event_s
        self._happen(event_s)

    def _next(self) -> tuple[VirtualCopy | None, float]:
        """What is sent now, and for how long before something else may be."""
        if self._piece is not None:
            return self._piece, self._piece_left_s
        queue = self._on_demand or self._prefetch
        if not queue:
            return None, float("inf")
        copy = next(iter(queue))
        if self._is_held and not copy.is_started:
            return None, float("inf")
        return copy, copy.left_s

    def _begin(self) -> None:
        """Time goes on, and what is first in the queue is being sent."""
        copy = self._next()[0]
        if copy is not None and not copy.is_started:
            copy.is_started = True
            copy.began_s = self._event_s = self._at
            self._meter.start()

    def _next_event(self) -> float:
        """When something was sent or arrives next; infinite where nothing is under way."""
        sent_s = self._at + self._next()[1]
        return min(sent_s, self._arriving[0].ended_s) if self._arriving else sent_s

    def _happen(self, event_s: float) -> None:
        """The next event, at its time."""
        if self._arriving and self._arriving[0].ended_s <= event_s:
            self._end(self._arriving[0])
        else:
            self._send(event_s, is_end=True)

    def _send(self, until_s: float, *, is_end: bool) -> None:
        """Send until then; `is_end`: that is the end of what is sent now."""
        copy, seconds, self._at = self._next()[0], until_s - self._at, until_s
        if copy is None:
            return
        if copy is not self._piece:
            copy.left_s = 0.0 if is_end else copy.left_s - seconds
        else:
            copy.left_s -= seconds
            self._piece_left_s -= seconds
            if is_end:
                self._piece = None
        if is_end and copy.left_s <= 1e-12:
            self._sent(copy)

    def _sent(self, copy: VirtualCopy) -> None:
        copy.left_s = 0.0
        copy.ended_s = self._at + self.latency_s
        self._on_demand.pop(copy, None)
        self._prefetch.pop(copy, None)
        self._arriving.append(copy)
        if not self.latency_s:
            self._end(copy)

    def _overtake(self) -> None:
        """An urgent copy arrives: the prefetch under way is interrupted after its piece."""
        if self._on_demand or self._piece is not None or not self._prefetch:
            return
        head = next(iter(self._prefetch))
        rest_s = head.left_s % self._piece_s
        if head.is_started and rest_s > 0.0:
            self._piece, self._piece_left_s = head, rest_s

    def _end(self, copy: VirtualCopy, *, is_cancelled: bool = False) -> None:
        copy.is_done = True
        copy.is_cancelled = is_cancelled
        copy.left_s = 0.0
        if copy is self._piece:
            self._piece = None
        if self._arriving and self._arriving[0] is copy:
            self._arriving.popleft()
        else:
            self._on_demand.pop(copy, None)
            self._prefetch.pop(copy, None)
        if is_cancelled:
            copy.ended_s = self._at
            return
        self._event_s = copy.ended_s
        self._meter.stop(self.nbytes)
        self.copied[copy.kind] += 1

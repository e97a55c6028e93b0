"""A link on a virtual clock: copies take the time that their bytes take, and nothing is copied.

A transfer engine for replay. One copy at a time; on-demand copies overtake prefetches at the end of
the piece under way, as ThreadTransfer does.
"""

from collections import OrderedDict
from collections.abc import Sequence

from ..collect.schema import ExpertKey
from ..runtime.errors import TransferError
from ..runtime.experts.cache import Kind, Slot
from ..runtime.experts.thread_transfer import PIECE_BYTES
from ..runtime.experts.transfer import Transfer
from ..runtime.testing import VirtualClock


class VirtualCopy:
    """VirtualLink's Transfer. `wait` lets the clock run on until the copy is complete."""

    __slots__ = ("_link", "began_s", "ended_s", "is_cancelled", "is_done", "is_started", "key",
                 "kind", "left_s", "nbytes", "slot")  # fmt: skip

    def __init__(self, link: "VirtualLink", key: ExpertKey, slot: Slot, *, kind: Kind) -> None:
        self.key = key
        self.slot = slot
        self.kind = kind
        self.nbytes = link.nbytes
        self.left_s = link.copy_s
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
    """Every copy is `nbytes` at `bytes_per_s`, after `latency_s`; single thread, never blocks.

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
        self.copy_s = latency_s + nbytes / bytes_per_s
        self.copied = {Kind.ON_DEMAND: 0, Kind.PREFETCH: 0}
        self._rate = nbytes / self.copy_s
        self._piece_s = piece_bytes / bytes_per_s
        self._clock = clock
        # All service up to this time is accounted for.
        self._at = 0.0
        self._on_demand: OrderedDict[VirtualCopy, None] = OrderedDict()
        self._prefetch: OrderedDict[VirtualCopy, None] = OrderedDict()
        # A prefetch whose piece was under way when it was overtaken, and when that piece ends.
        self._piece: VirtualCopy | None = None
        self._piece_left_s = 0.0
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

    def used(self, slots: Sequence[Slot]) -> None:
        """Nothing: what is computed is time only."""

    def bandwidth(self) -> float:
        """Bytes a second as an engine would measure them, latency included."""
        return self._rate

    def outstanding_bytes(self) -> int:
        self.catch_up()
        left_s = sum(copy.left_s for copy in (*self._on_demand, *self._prefetch))
        return round(left_s * self._rate)

    def close(self) -> None:
        self._is_closed = True
        for copy in [*self._on_demand, *self._prefetch]:
            self._end(copy, is_cancelled=True)

    def cancel(self, copy: VirtualCopy) -> bool:
        """Take a copy out of the queue; False once any of its bytes moved."""
        self.catch_up()
        if copy.is_started or copy.is_done:
            return False
        self._end(copy, is_cancelled=True)
        return True

    def catch_up(self) -> None:
        """Account for what the link did up to the clock's time."""
        now = self._clock.now
        while self._at < now:
            copy, share_s = self._next()
            if copy is None:
                self._at = now
                return
            if self._at + share_s <= now:
                self._at += share_s
                self._serve(copy, share_s, ends=True)
            else:
                self._serve(copy, now - self._at, ends=False)
                self._at = now

    def run_to_next_end(self) -> None:
        """Let the clock run on until the link is through with what it does now."""
        self.catch_up()
        copy, share_s = self._next()
        if copy is None:
            raise TransferError("nothing is being copied, so nothing can be waited for")
        self._at = self._clock.now = self._at + share_s
        self._serve(copy, share_s, ends=True)

    def _next(self) -> tuple[VirtualCopy | None, float]:
        """What is served now, and for how long before something else may be."""
        if self._piece is not None:
            return self._piece, self._piece_left_s
        queue = self._on_demand or self._prefetch
        if not queue:
            return None, 0.0
        copy = next(iter(queue))
        return copy, copy.left_s

    def _serve(self, copy: VirtualCopy, seconds: float, *, ends: bool) -> None:
        if not copy.is_started:
            copy.is_started = True
            # `_at` is the end of what is served where that ends, else its beginning.
            copy.began_s = self._at - seconds if ends else self._at
        if copy is self._piece:
            self._piece_left_s -= seconds
            copy.left_s -= seconds
            if ends:
                self._piece = None
                if copy.left_s <= 1e-12:
                    self._end(copy)
        elif ends:
            self._end(copy)
        else:
            copy.left_s -= seconds

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
        copy.ended_s = self._at
        copy.is_cancelled = is_cancelled
        copy.left_s = 0.0
        if copy is self._piece:
            self._piece = None
        self._on_demand.pop(copy, None)
        self._prefetch.pop(copy, None)
        if not is_cancelled:
            self.copied[copy.kind] += 1

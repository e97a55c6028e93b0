"""The experts that one layer needs in one step: found, fetched, and handed out as they arrive.

Decides nothing about what is read ahead and computes nothing. A layer that needs more experts than
can be held at once gets them in waves: what was computed is let go to make room for the rest.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence

from ..collect.schema import ExpertKey
from .errors import TransferError
from .experts.cache import ExpertCache, Kind, Slot
from .experts.prefetcher import Prefetcher
from .experts.transfer import Transfer, TransferEngine
from .stats import ExpertTraffic

logger = logging.getLogger(__name__)

MAX_RETRIES = 16
"""Reads of a layer that are tried again after a copy thread died, which ends what waits for it."""


class Acquisition:
    """A context manager over the experts `needed`, distinct and in ascending order.

    Look-ups are counted into `traffic` on entry, where the reads of what is missing are also
    submitted; `waves` then blocks on them. `stall_s` is the time spent waiting. Leaving gives every
    slot back, also after an error.
    """

    def __init__(
        self,
        needed: Sequence[ExpertKey],
        *,
        cache: ExpertCache,
        transfers: TransferEngine,
        prefetcher: Prefetcher,
        traffic: ExpertTraffic,
    ) -> None:
        self._needed = needed
        self._cache = cache
        self._transfers = transfers
        self._prefetcher = prefetcher
        self._traffic = traffic
        self._ready: list[tuple[ExpertKey, Slot]] = []
        self._in_flight: deque[Transfer] = deque()
        self._missing: deque[ExpertKey] = deque()
        self._num_retries = 0
        self._lease = cache.pin(())
        self.stall_s = 0.0
        self.num_failed_prefetches = 0

    def __enter__(self) -> "Acquisition":
        try:
            self._prefetcher.settle()
            for key in self._needed:
                self._look_up(key)
            self._submit()
        except BaseException:
            # A `with` statement leaves only what it has entered.
            self.__exit__()
            raise
        return self

    def _look_up(self, key: ExpertKey) -> None:
        traffic = self._traffic
        traffic.lookups += 1
        slot = self._lease.hold(key)
        if slot is not None:
            self._ready.append((key, slot))
            if self._cache.record_use(key):
                traffic.hits_prefetched += 1
                traffic.prefetch_used_next += self._prefetcher.was_for_next(key)
            else:
                traffic.hits_resident += 1
            return
        copy = self._prefetcher.claim(key)
        if copy is not None:
            traffic.late_hits += 1
            traffic.prefetch_used_next += self._prefetcher.was_for_next(key)
            self._in_flight.append(copy)
        else:
            traffic.misses += 1
            self._prefetcher.missed(key)
            self._missing.append(key)
        self._cache.record_use(key)

    @property
    def is_reading(self) -> bool:
        """Reads of what is needed are under way, so that compute would wait."""
        return bool(self._in_flight)

    @property
    def has_ready(self) -> bool:
        """The next wave comes without waiting."""
        return bool(self._ready)

    @property
    def is_blocking(self) -> bool:
        """`gather` will have to wait on the host."""
        return not all(copy.is_ordered for copy in self._in_flight)

    def gather(self) -> bool:
        """Block until every needed expert lies in a slot, all at once.

        False where there are not so many slots: `waves` then goes on. Raises TransferError.
        """
        while self._in_flight:
            self._wait()
        return not self._missing

    def waves(self) -> Iterator[list[tuple[ExpertKey, Slot]]]:
        """Experts with their slots, readable until the next wave is asked for; blocks on reads.

        Every needed expert comes exactly once. Raises TransferError if one cannot be read.
        """
        while self._ready or self._in_flight or self._missing:
            if not self._ready:
                self._wait()
                continue
            wave, self._ready = self._ready, []
            yield wave
            self._collect()
            if self._missing:
                self._release()
                self._submit()

    def _hand_out(self, key: ExpertKey, slot: Slot) -> None:
        self._lease.add(key)
        self._ready.append((key, slot))

    def _submit(self) -> None:
        keep = self._prefetcher.wanted
        while self._missing:
            key = self._missing[0]
            if self._take_prefetched(key):
                self._missing.popleft()
                continue
            slot = self._cache.reserve(key, Kind.ON_DEMAND, keep=keep)
            if slot is None:
                return
            self._missing.popleft()
            try:
                copy = self._transfers.submit(key, slot, Kind.ON_DEMAND)
            except TransferError:
                self._cache.abandon(slot)
                raise
            self._traffic.bytes_on_demand += copy.nbytes
            self._in_flight.append(copy)

    def _take_prefetched(self, key: ExpertKey) -> bool:
        # A forecast for a later step may have had it read ahead since it was looked up.
        slot = self._lease.hold(key)
        if slot is not None:
            self._ready.append((key, slot))
            return True
        copy = self._prefetcher.claim(key)
        if copy is not None:
            self._in_flight.append(copy)
        return copy is not None

    def _wait(self) -> None:
        if not self._in_flight:
            # Nothing of ours is pinned or loading, and prefetches may not take the last slot.
            self._prefetcher.settle()
            self._submit()
            if self._ready:
                return
            assert self._in_flight, "no slot for a missing expert although none is in use"
        began = time.perf_counter()
        self._finish(self._in_flight[0])
        self.stall_s += time.perf_counter() - began
        self._collect()

    def _collect(self) -> None:
        for copy in [copy for copy in self._in_flight if copy.done()]:
            self._finish(copy)

    def _finish(self, copy: Transfer) -> None:
        # Until its slot is settled it counts as in flight, so that an interrupt loses no slot.
        try:
            copy.wait()
        except TransferError as error:
            self._in_flight.remove(copy)
            self._cache.abandon(copy.slot)
            is_prefetch = copy.kind is Kind.PREFETCH
            # Who copied may have died with a sound file in hand: others, or we, can read it.
            if not is_prefetch:
                if self._num_retries == MAX_RETRIES or not self._transfers.degraded:
                    raise
                self._num_retries += 1
            logger.warning("copying %s failed, reading it on demand: %s", copy.key, error)
            self.num_failed_prefetches += is_prefetch
            self._missing.appendleft(copy.key)
            self._submit()
            return
        self._in_flight.remove(copy)
        self._cache.commit(copy.slot)
        self._hand_out(copy.key, copy.slot)

    def _release(self) -> None:
        # Experts that are ready but not handed out yet stay pinned.
        computed, self._lease = self._lease, self._cache.pin(key for key, _ in self._ready)
        self._transfers.used([*computed.slots.values()])
        computed.release()

    def __exit__(self, *_: object) -> None:
        interrupt: KeyboardInterrupt | None = None
        while self._in_flight:
            try:
                self._give_back(self._in_flight[0])
            except KeyboardInterrupt as error:
                # A second Ctrl-C has to wait for reads under way, which end in bounded time.
                interrupt = error
        self._transfers.used([*self._lease.slots.values()])
        self._lease.release()
        if interrupt is not None:
            raise interrupt

    def _give_back(self, copy: Transfer) -> None:
        is_read = False
        if not copy.cancel():
            try:
                copy.wait()
                is_read = True
            except TransferError as error:
                logger.warning("a read that is no longer needed failed: %s", error)
        self._in_flight.remove(copy)
        if is_read:
            self._cache.commit(copy.slot)
        else:
            self._cache.abandon(copy.slot)

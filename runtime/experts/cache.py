"""Which expert holds which slot: states, pins and counts.

Bookkeeping only, one thread: no tensors, no files, no copies. Who evicts whom is the policy's.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Self

import numpy as np

from ...collect.schema import ExpertKey
from ...predictors.base import Forecast
from .eviction import Evictable, EvictionPolicy

Slot = int
ABSENT, ARRIVING = -1, -2
"""In a table of slots: the expert holds none, or one that is being written."""

_RELEASED = "the lease was released; pin the experts anew"


class Kind(Enum):
    """Why an expert is copied: it is needed now, or a forecast says that it will be."""

    ON_DEMAND = "on-demand"
    PREFETCH = "prefetch"


class SlotState(Enum):
    """FREE -> LOADING (reserved, being written) -> READY (may be read) -> FREE or LOADING again."""

    FREE = "free"
    LOADING = "loading"
    READY = "ready"


# Members by name: on Python 3.11 each look-up in an Enum costs as much as one in a dictionary.
_LOADING, _READY, _PREFETCH = SlotState.LOADING, SlotState.READY, Kind.PREFETCH


@dataclass(slots=True)
class CacheCounters:
    """Totals since the cache was made. Every prefetch ends as used, wasted or cancelled."""

    uses: int = 0
    evictions: int = 0
    prefetch_issued: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0
    prefetch_cancelled: int = 0


@dataclass(slots=True)
class _Entry:
    key: ExpertKey
    slot: Slot
    state: SlotState
    # Came by prefetch and was not used yet.
    is_unused_prefetch: bool
    # LOADING for a prefetch that nobody waits for: counts against prefetch_limit.
    is_ahead: bool
    num_pins: int = 0


class Lease:
    """Pinned experts: none of `slots` is evicted before `release`. A context manager.

    Made by ExpertCache.pin. Releasing twice does nothing; a released lease refuses `add`.
    """

    def __init__(self, cache: "ExpertCache") -> None:
        self._cache = cache
        self._is_released = False
        self.slots: dict[ExpertKey, Slot] = {}

    def add(self, *keys: ExpertKey) -> None:
        """Pin more READY experts; one that the lease holds already is not counted twice.

        All or none: KeyError for a key that is not READY, before any is pinned.
        """
        if self._is_released:
            raise ValueError(_RELEASED)
        for entry in self._cache._ready_entries(keys):
            if entry.key not in self.slots:
                entry.num_pins += 1
                self.slots[entry.key] = entry.slot

    def hold(self, key: ExpertKey) -> Slot | None:
        """Pin one expert if it is READY: its slot, or None. What `lookup` and `add` would do."""
        entry = self._cache._entries.get(key)
        if entry is None or entry.state is not SlotState.READY:
            return None
        if self._is_released:
            raise ValueError(_RELEASED)
        if key not in self.slots:
            entry.num_pins += 1
            self.slots[key] = entry.slot
        return entry.slot

    def release(self) -> None:
        """Let the experts be evicted again; idempotent."""
        if not self._is_released:
            self._is_released = True
            for entry in self._cache._ready_entries(self.slots):
                entry.num_pins -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class ExpertCache:
    """Slots 0 to num_slots - 1 and the experts in them. Single thread, never blocks.

    `prefetch_limit` bounds the slots that are LOADING for prefetches at one time, so that misses
    always find room; the default is a quarter, which is none below 4 slots.
    """

    def __init__(
        self, num_slots: int, *, eviction: EvictionPolicy, prefetch_limit: int | None = None
    ) -> None:
        if num_slots < 1:
            raise ValueError(f"a cache of {num_slots} slots: at least one is needed")
        self.num_slots = num_slots
        self.prefetch_limit = num_slots // 4 if prefetch_limit is None else prefetch_limit
        self.counters = CacheCounters()
        self._eviction = eviction
        self._entries: dict[ExpertKey, _Entry] = {}
        self._slots: list[_Entry | None] = [None] * num_slots
        # Lowest slot on top: runs are easier to compare when slots fill in order.
        self._free: list[Slot] = list(reversed(range(num_slots)))
        self._num_ahead = 0
        self._num_loading = 0
        self._table: np.ndarray | None = None

    def table(self, num_layers: int, num_experts: int) -> np.ndarray:
        """Slots of READY experts [layers, experts] int64, ARRIVING for LOADING ones, else ABSENT:
        kept up to date, not to be written to.
        """
        if self._table is None:
            self._table = np.full((num_layers, num_experts), ABSENT, np.int64)
            for key, entry in self._entries.items():
                self._table[key] = entry.slot if entry.state is _READY else ARRIVING
        return self._table

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    @property
    def num_loading(self) -> int:
        """Slots being written, for either kind."""
        return self._num_loading

    @property
    def prefetch_room(self) -> int:
        """Prefetches that `prefetch_limit` allows on top of those under way."""
        return self.prefetch_limit - self._num_ahead

    @property
    def num_ready(self) -> int:
        """Slots that hold an expert to be read."""
        return len(self._entries) - self._num_loading

    def lookup(self, key: ExpertKey) -> Slot | None:
        """The slot of a READY expert; None if it is absent or still LOADING."""
        entry = self._entries.get(key)
        return entry.slot if entry is not None and entry.state is _READY else None

    def state(self, key: ExpertKey) -> SlotState | None:
        """LOADING or READY; None if the expert holds no slot."""
        entry = self._entries.get(key)
        return None if entry is None else entry.state

    def slot_of(self, key: ExpertKey) -> Slot | None:
        """The slot an expert holds, be it LOADING or READY; not a permission to read it."""
        entry = self._entries.get(key)
        return None if entry is None else entry.slot

    def resident(self) -> dict[ExpertKey, Slot]:
        """All READY experts; a copy."""
        return {key: entry.slot for key, entry in self._entries.items() if entry.state is _READY}

    @property
    def wants_forecasts(self) -> bool:
        """The eviction policy makes use of forecasts, also where nothing is read ahead."""
        return self._eviction.wants_forecasts

    def foresee(self, forecast: Forecast) -> None:
        """Let eviction know what is to come: the newest forecast for its layers and step.

        Unchecked: `Forecast.check` belongs before. Steps are those of `advance`.
        """
        self._eviction.foresee(forecast)

    def advance(self, step: int, layer_idx: int) -> None:
        """Execution stands at this layer of this step, -1 before the first; before its look-ups."""
        self._eviction.advance(step, layer_idx)

    def victim_worth(self, incoming: ExpertKey) -> float:
        """What a prefetch of `incoming` would evict now is worth: its chance of a use, discounted.

        0 where a slot is free, none can be had, or the policy knows no worth.
        """
        if self._free or not self._eviction.wants_forecasts:
            return 0.0
        victim = self._eviction.victim(incoming, self._is_evictable)
        return 0.0 if victim is None else self._eviction.worth(victim)

    def reserve(
        self, key: ExpertKey, kind: Kind, *, keep: Collection[ExpertKey] = frozenset()
    ) -> Slot | None:
        """Take a free slot, or a READY unpinned victim's, for `key`; the slot is LOADING then.

        None if every slot is LOADING or pinned, or, for a prefetch, if `prefetch_limit` is reached
        or only experts in `keep` could go. An on-demand reserve spares `keep` while it can.
        ValueError if the expert holds a slot already.
        """
        if key in self._entries:
            raise ValueError(f"{key} holds slot {self._entries[key].slot} already")
        is_prefetch = kind is _PREFETCH
        if is_prefetch and self._num_ahead >= self.prefetch_limit:
            return None
        if self._free:
            slot = self._free.pop()
        else:
            spared = self._sparing(keep) if keep else self._is_evictable
            victim = self._eviction.victim(key, spared)
            if victim is None and keep and not is_prefetch:
                victim = self._eviction.victim(key, self._is_evictable)
            if victim is None:
                return None
            slot = self._evict(victim)
        entry = _Entry(key, slot, _LOADING, is_prefetch, is_prefetch)
        self._entries[key] = entry
        self._slots[slot] = entry
        if self._table is not None:
            self._table[key] = ARRIVING
        self._eviction.admit(key)
        self._num_loading += 1
        self._num_ahead += is_prefetch
        self.counters.prefetch_issued += is_prefetch
        return slot

    def commit(self, slot: Slot) -> None:
        """The copy into `slot` is complete: LOADING -> READY. ValueError in another state."""
        entry = self._loading_entry(slot)
        entry.state = _READY
        self._leave_loading(entry)
        if self._table is not None:
            self._table[entry.key] = slot

    def abandon(self, slot: Slot) -> None:
        """The copy was cancelled or failed: LOADING -> FREE. ValueError in another state.

        Only once nothing writes to the slot any more.
        """
        entry = self._loading_entry(slot)
        self._leave_loading(entry)
        self.counters.prefetch_cancelled += entry.is_unused_prefetch
        self._remove(entry)
        self._free.append(slot)

    def promote(self, slot: Slot) -> None:
        """A LOADING prefetch is waited for now: it no longer counts against `prefetch_limit`."""
        entry = self._loading_entry(slot)
        self._num_ahead -= entry.is_ahead
        entry.is_ahead = False

    def pin(self, keys: Iterable[ExpertKey]) -> Lease:
        """Protect READY experts from eviction until the lease is released. KeyError otherwise."""
        lease = Lease(self)
        lease.add(*keys)
        return lease

    def record_use(self, key: ExpertKey) -> bool:
        """Count one look-up of `key` in a step; True on the first use of a prefetched expert.

        An expert that holds no slot may be recorded too: the policy learns from it.
        """
        self.counters.uses += 1
        self._eviction.touch(key)
        entry = self._entries.get(key)
        if entry is None or not entry.is_unused_prefetch:
            return False
        entry.is_unused_prefetch = False
        self.counters.prefetch_used += 1
        return True

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken; O(num_slots)."""
        held = [entry for entry in self._slots if entry is not None]
        free = {slot for slot, entry in enumerate(self._slots) if entry is None}
        loading = [entry for entry in held if entry.state is _LOADING]
        unused = sum(entry.is_unused_prefetch for entry in held)
        counters = self.counters
        ended = counters.prefetch_used + counters.prefetch_wasted + counters.prefetch_cancelled
        claims = {
            "each slot is free or held, once": sorted(self._free) == sorted(free),
            "entries and slots name each other": len(held) == len(self._entries)
            and all(
                self._entries.get(entry.key) is entry and self._slots[entry.slot] is entry
                for entry in held
            ),
            "held slots are LOADING or READY": all(
                entry.state is not SlotState.FREE for entry in held
            ),
            "LOADING is counted": len(loading) == self._num_loading,
            "prefetches ahead are counted": self._num_ahead
            == sum(entry.is_ahead for entry in loading),
            "prefetches ahead keep the limit": self._num_ahead <= self.prefetch_limit,
            "only LOADING slots are ahead": not any(
                entry.is_ahead for entry in held if entry.state is _READY
            ),
            "pins are counts, of READY experts": all(
                entry.num_pins >= 0 and (entry.num_pins == 0 or entry.state is _READY)
                for entry in held
            ),
            "the table has who holds a slot": self._table is None
            or {
                key: int(self._table[key])
                for key in map(ExpertKey._make, np.argwhere(self._table != ABSENT).tolist())
            }
            == {
                key: entry.slot if entry.state is _READY else ARRIVING
                for key, entry in self._entries.items()
            },
            "each prefetch ends once": counters.prefetch_issued == ended + unused,
        }
        broken = [claim for claim, holds in claims.items() if not holds]
        if broken:
            raise AssertionError(f"expert cache: broken: {'; '.join(broken)}")

    def _is_evictable(self, key: ExpertKey) -> bool:
        entry = self._entries.get(key)
        return entry is not None and entry.state is _READY and entry.num_pins == 0

    def _sparing(self, keep: Collection[ExpertKey]) -> Evictable:
        # Asked hundreds of times a token, hence in one call.
        entries = self._entries

        def is_spared(key: ExpertKey) -> bool:
            entry = entries.get(key)
            return (
                entry is not None
                and entry.state is _READY
                and entry.num_pins == 0
                and key not in keep
            )

        return is_spared

    def _ready_entries(self, keys: Iterable[ExpertKey]) -> list[_Entry]:
        entries = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is None or entry.state is not _READY:
                raise KeyError(f"{key} is not READY and cannot be pinned")
            entries.append(entry)
        return entries

    def _loading_entry(self, slot: Slot) -> _Entry:
        entry = self._slots[slot]
        if entry is None or entry.state is not _LOADING:
            state = SlotState.FREE if entry is None else entry.state
            raise ValueError(f"slot {slot} is {state.name}, not LOADING")
        return entry

    def _leave_loading(self, entry: _Entry) -> None:
        self._num_loading -= 1
        self._num_ahead -= entry.is_ahead
        entry.is_ahead = False

    def _evict(self, victim: ExpertKey) -> Slot:
        if not self._is_evictable(victim):
            raise RuntimeError(f"the eviction policy chose {victim}, which may not be evicted")
        entry = self._entries[victim]
        self.counters.evictions += 1
        self.counters.prefetch_wasted += entry.is_unused_prefetch
        self._remove(entry)
        return entry.slot

    def _remove(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        self._slots[entry.slot] = None
        if self._table is not None:
            self._table[entry.key] = ABSENT
        self._eviction.discard(entry.key)

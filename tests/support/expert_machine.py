"""A state machine of everything that holds experts: cache, prefetcher, acquisition and copies."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)
from torn_transfer import TornTransfer

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.predictors.base import Forecast
from outrider.runtime.acquisition import Acquisition
from outrider.runtime.errors import TransferError
from outrider.runtime.experts.cache import ExpertCache, Kind, Lease, SlotState
from outrider.runtime.experts.eviction import EVICTIONS, make_eviction
from outrider.runtime.experts.prefetcher import MODES, Prefetcher
from outrider.runtime.experts.slots import SlotArena
from outrider.runtime.stats import ExpertTraffic
from outrider.runtime.testing import SyntheticExperts, VirtualClock, write_experts

LAYERS, EXPERTS = 3, 6
SHAPE = ModelShape(LAYERS, EXPERTS, 2, 8, 8, "")
KEYS = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
PROBABILITIES = st.sampled_from([0.0, 0.1, 0.4, 0.9, 1.0])


class ExpertMachine(RuleBasedStateMachine):
    """Forecasts, layers, pins, failures and interrupts in any order, over real bytes.

    At any time a READY slot holds its expert whole, a pinned expert keeps its slot, and counts
    add up; in the end nothing is pinned or under way. A wait that never ends is a time-out.
    """

    leases = Bundle("leases")

    @initialize(
        num_slots=st.integers(1, 9),
        eviction=st.sampled_from(sorted(EVICTIONS)),
        mode=st.sampled_from(MODES),
        is_packed=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    def build(self, num_slots: int, eviction: str, mode: Any, is_packed: bool, seed: int) -> None:
        self.source = _source(is_packed)
        self.arena = SlotArena(num_slots, self.source.views, self.source.nbytes)
        self.engine = TornTransfer(self.source, self.arena, seed=seed)
        self.cache = ExpertCache(
            num_slots,
            eviction=make_eviction(eviction, shape=SHAPE, num_slots=num_slots),
            prefetch_limit=min(3, num_slots - 1),
        )
        self.clock = VirtualClock()
        self.prefetcher = Prefetcher(
            self.cache,
            self.engine,
            shape=SHAPE,
            nbytes=self.source.nbytes,
            mode=mode,
            clock=self.clock,
        )
        self.traffic = ExpertTraffic()
        self.step, self.layer_idx = 0, -1
        self.held: dict[int, tuple[Lease, dict[ExpertKey, int]]] = {}

    @rule(
        layer_from=st.integers(0, LAYERS - 1),
        ahead=st.integers(0, 2),
        probability=st.lists(
            st.lists(PROBABILITIES, min_size=EXPERTS, max_size=EXPERTS),
            min_size=1,
            max_size=LAYERS,
        ),
    )
    def foresee(self, layer_from: int, ahead: int, probability: list[list[float]]) -> None:
        rows = probability[: LAYERS - layer_from]
        table = np.array(rows, dtype=np.float32)
        self.prefetcher.offer(
            Forecast(self.step + ahead, layer_from, layer_from + len(rows), table)
        )

    @rule(seconds=st.sampled_from([0.0, 0.01, 5.0]))
    def look_ahead(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.prefetcher.advance(self.step, self.layer_idx)

    @rule(
        needed=st.sets(st.integers(0, EXPERTS - 1), min_size=1),
        skipped=st.integers(0, 1),
        leaves=st.booleans(),
    )
    def run_layer(self, needed: set[int], skipped: int, leaves: bool) -> None:
        self._go_on(1 + skipped)
        keys = [ExpertKey(self.layer_idx, expert_idx) for expert_idx in sorted(needed)]
        got: list[ExpertKey] = []
        acquisition = Acquisition(
            keys,
            cache=self.cache,
            transfers=self.engine,
            prefetcher=self.prefetcher,
            traffic=self.traffic,
        )
        if self._is_full():
            return
        try:
            with acquisition:
                self.prefetcher.advance(self.step, self.layer_idx)
                for wave in acquisition.waves():
                    self.engine.act()  # copies go on while the wave is computed
                    for key, slot in wave:
                        assert self.cache.state(key) is SlotState.READY
                        assert self.source.is_held(key, self.arena, slot), key
                    got += [key for key, _ in wave]
                    if leaves:
                        break
        except (TransferError, KeyboardInterrupt):
            return
        if not leaves:
            assert sorted(got) == keys, "each expert comes once"

    @rule()
    def copies_go_on(self) -> None:
        self.engine.act()

    @rule()
    def all_copies_end(self) -> None:
        self.engine.complete_all()

    @rule(target=leases, count=st.integers(1, 3))
    def pin(self, count: int) -> int:
        chosen = sorted(self.cache.resident())[:count]
        lease = self.cache.pin(chosen)
        self.held[id(lease)] = (lease, dict(lease.slots))
        return id(lease)

    @rule(number=consumes(leases))
    def unpin(self, number: int) -> None:
        lease, _ = self.held.pop(number)
        lease.release()

    @rule(
        fails=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
        refuses=st.sampled_from([0.0, 0.0, 0.2, 1.0]),
        interrupts=st.sampled_from([0.0, 0.0, 0.3]),
    )
    def fortunes_change(self, fails: float, refuses: float, interrupts: float) -> None:
        self.engine.fails, self.engine.refuses = fails, refuses
        self.engine.interrupts = interrupts

    @rule(stall_s=st.floats(0.0, 1.0), others_s=st.floats(0.0, 1.0), is_decode=st.booleans())
    def step_ends(self, stall_s: float, others_s: float, is_decode: bool) -> None:
        if is_decode:
            self.prefetcher.end_step(
                stall_s=stall_s,
                on_demand_bytes=2 * self.source.nbytes,
                wall_s=stall_s + others_s,
            )
        self._go_on(LAYERS - self.layer_idx)
        self.prefetcher.begin_step(is_decode=is_decode)
        self.prefetcher.advance(self.step, self.layer_idx)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=6))
    def warm_start(self, keys: list[ExpertKey]) -> None:
        self.prefetcher.warm(keys)

    @rule()
    def another_sequence(self) -> None:
        self.prefetcher.begin()
        self.step, self.layer_idx = 0, -1

    @precondition(lambda self: hasattr(self, "cache"))
    @invariant()
    def slots_hold_what_they_say(self) -> None:
        self.cache.check()
        for key, slot in self.cache.resident().items():
            assert self.source.is_held(key, self.arena, slot), f"{key} in slot {slot} is torn"

    @precondition(lambda self: hasattr(self, "cache"))
    @invariant()
    def pinned_experts_stay(self) -> None:
        for _, slots in self.held.values():
            for key, slot in slots.items():
                assert self.cache.lookup(key) == slot, f"pinned {key} was evicted"

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.engine.interrupts = self.engine.refuses = 0.0
        for lease, _ in self.held.values():
            lease.release()
        self.prefetcher.close()
        try:
            assert self.cache.num_loading == 0, "a slot is lost to a copy that nobody waits for"
            assert not self.engine.pending
            self.traffic.check()
            self.cache.check()
            # With no pins left every slot can be had.
            absent = [key for key in KEYS if self.cache.state(key) is None]
            for key in absent[: self.cache.num_slots]:
                assert self.cache.reserve(key, Kind.ON_DEMAND) is not None
            assert self.cache.num_loading == self.cache.num_slots
        finally:
            self.engine.close()
            self.arena.close()

    def _go_on(self, layers: int) -> None:
        self.layer_idx += layers
        if self.layer_idx >= LAYERS:
            self.step, self.layer_idx = self.step + 1, -1 if layers == LAYERS else 0
        self.cache.advance(self.step, self.layer_idx)

    def _is_full(self) -> bool:
        """Others hold every slot that no prefetch is read into: nothing could be served.

        The engine pins for one layer at a time only, so that prefetches always leave it a slot.
        """
        pinned = {slot for _, slots in self.held.values() for slot in slots.values()}
        return len(pinned) + self.cache.num_loading >= self.cache.num_slots


@cache
def _source(is_packed: bool) -> SyntheticExperts:
    """Experts on disk, made once a process."""
    folder = tempfile.TemporaryDirectory(prefix="outrider-machine-")
    _folders.append(folder)
    return write_experts(Path(folder.name), SHAPE, is_packed=is_packed)


_folders: list[tempfile.TemporaryDirectory[str]] = []

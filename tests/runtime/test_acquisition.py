"""Acquiring a layer's experts: each once, from the right slot, whatever the copies do."""

import random
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.predictors.base import Forecast
from outrider.runtime.acquisition import Acquisition
from outrider.runtime.errors import TransferError
from outrider.runtime.experts.cache import ExpertCache, Kind, SlotState
from outrider.runtime.experts.eviction import make_eviction
from outrider.runtime.experts.prefetcher import Prefetcher
from outrider.runtime.stats import ExpertTraffic
from outrider.runtime.testing import ManualTransfer

NUM_LAYERS, NUM_EXPERTS = 3, 6
NUM_STRANGERS = 8  # experts that no layer asks for
SHAPE = ModelShape(NUM_LAYERS, NUM_EXPERTS + NUM_STRANGERS, 2, 8, 8, "")
KEYS = [ExpertKey(layer, e) for layer in range(NUM_LAYERS) for e in range(NUM_EXPERTS)]


class Waited:
    """A copy whose `wait` lets fate complete and fail copies in any order until this one ends."""

    def __init__(self, copy, fate):
        self._copy = copy
        self._fate = fate
        self.key, self.slot, self.kind, self.nbytes = copy.key, copy.slot, copy.kind, 1

    def done(self):
        return self._copy.done()

    def cancel(self):
        return self._copy.cancel()

    def wait(self):
        while not self._copy.done():
            if self._fate.random.random() < self._fate.interrupts:
                raise KeyboardInterrupt
            self._fate.act()
        self._copy.wait()


class Fate:
    """A transfer engine that ends copies at random; `contents` is what each slot truly holds."""

    degraded = False

    def __init__(self, seed, *, fails=0.0, interrupts=0.0, refuses=0.0):
        self.random = random.Random(seed)
        self.fails = fails
        self.interrupts = interrupts
        self.refuses = refuses
        self.contents = {}
        self.failed = set()
        self._manual = ManualTransfer(nbytes=1)

    def submit(self, key, slot, kind):
        if self.random.random() < self.refuses:
            raise TransferError(f"expert {key}: refused by fate")
        self.contents[slot] = None
        return Waited(self._manual.submit(key, slot, kind), self)

    def promote(self, transfer):
        self._manual.promote(transfer._copy)

    def act(self):
        """Start, complete or fail one of the pending copies."""
        if not self._manual.pending:
            return
        copy = self.random.choice(self._manual.pending)
        action = self.random.random()
        if action < self.fails:
            self.failed.add((copy.key, copy.kind))
            self._manual.fail(copy)
        elif action < 0.9:
            self._manual.complete(copy)
            self.contents[copy.slot] = copy.key
        else:
            self._manual.start(copy)

    def used(self, slots):
        pass

    def bandwidth(self):
        return 0.0

    def outstanding_bytes(self):
        return len(self._manual.pending)

    def close(self):
        self._manual.close()


class Stage:
    """Cache, transfers and prefetcher, and what must hold of them at any time."""

    def __init__(self, seed, num_slots, *, mode="on", **chances):
        self.fate = Fate(seed, **chances)
        self.cache = ExpertCache(
            num_slots,
            eviction=make_eviction("layer-lfu", shape=SHAPE, num_slots=num_slots),
            prefetch_limit=min(2, num_slots - 1),
        )
        self.prefetcher = Prefetcher(
            self.cache, self.fate, shape=SHAPE, nbytes=1, mode=mode, clock=lambda: 0.0
        )
        self.traffic = ExpertTraffic()
        self.step = 0

    def acquire(self, keys):
        return Acquisition(
            keys,
            cache=self.cache,
            transfers=self.fate,
            prefetcher=self.prefetcher,
            traffic=self.traffic,
        )

    def foresee(self, layer_idx):
        """Forecast random experts of all layers, and let what is queued go on a little."""
        experts = self.fate.random
        probability = np.zeros((NUM_LAYERS, SHAPE.num_experts), np.float32)
        for place in np.ndindex(NUM_LAYERS, NUM_EXPERTS):
            probability[place] = experts.choice([0.0, 0.5, 0.9])
        self.prefetcher.offer(Forecast(self.step + 1, 0, NUM_LAYERS, probability))
        self.prefetcher.advance(self.step, layer_idx)
        for _ in range(experts.randrange(4)):
            self.fate.act()
        self.cache.check()

    def check_slots(self):
        """READY slots hold what the cache says they hold."""
        for key, slot in self.cache.resident().items():
            assert self.fate.contents[slot] == key
        self.cache.check()

    def check_released(self):
        """Nothing is pinned or being written for anybody but the prefetcher, nor then for it."""
        self.check_slots()
        self.traffic.check()
        self.fate.interrupts = self.fate.refuses = 0.0
        self.prefetcher.close()
        assert self.cache.num_loading == 0
        strangers = [ExpertKey(0, NUM_EXPERTS + n) for n in range(self.cache.num_slots)]
        for key in strangers:
            assert self.cache.reserve(key, Kind.ON_DEMAND) is not None


needs = st.lists(
    st.tuples(
        st.integers(0, NUM_LAYERS - 1),
        st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1),
    ),
    min_size=1,
    max_size=12,
)


def passes(stage, layers):
    """(layer, keys) in the order of execution: a lower layer after a higher one is a new step."""
    before = -1
    for layer_idx, experts in layers:
        if layer_idx <= before:
            stage.step += 1
        before = layer_idx
        yield layer_idx, [ExpertKey(layer_idx, e) for e in sorted(experts)]


@settings(max_examples=150, deadline=None)
@given(layers=needs, num_slots=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_each_expert_comes_once_from_a_slot_that_holds_it(layers, num_slots, seed):
    stage = Stage(seed, num_slots)
    for layer_idx, keys in passes(stage, layers):
        lookups = stage.traffic.lookups
        got = []
        with stage.acquire(keys) as acquisition:
            stage.foresee(layer_idx)
            for wave in acquisition.waves():
                assert wave, "an empty wave is a pass over nothing"
                for _ in range(stage.fate.random.randrange(3)):
                    stage.fate.act()  # copies go on while the wave is computed
                assert len(wave) <= num_slots
                for key, slot in wave:
                    assert stage.cache.state(key) is SlotState.READY
                    assert stage.fate.contents[slot] == key
                got += [key for key, _ in wave]
                stage.cache.check()
        assert sorted(got) == keys
        assert len(set(got)) == len(got)
        assert stage.traffic.lookups - lookups == len(keys)
        stage.check_slots()
    stage.check_released()


@settings(max_examples=150, deadline=None)
@given(layers=needs, num_slots=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_a_failed_read_ends_the_layer_and_nothing_else(layers, num_slots, seed):
    stage = Stage(seed, num_slots, fails=0.25)
    for layer_idx, keys in passes(stage, layers):
        stage.fate.failed.clear()
        got = []
        try:
            with stage.acquire(keys) as acquisition:
                stage.foresee(layer_idx)
                for wave in acquisition.waves():
                    for key, slot in wave:
                        assert stage.fate.contents[slot] == key
                    got += [key for key, _ in wave]
        except TransferError:
            # Only an on-demand read may end it: a failed prefetch is read again.
            assert any((key, Kind.ON_DEMAND) in stage.fate.failed for key in keys)
        else:
            assert sorted(got) == keys
        stage.check_slots()
    stage.check_released()


@settings(max_examples=100, deadline=None)
@example(
    layers=[(0, {0, 1}), (1, {0, 1, 2, 3}), (1, {1}), (1, {0, 1, 2})],
    num_slots=4,
    seed=180480304,
    interrupts=0.5,
    refuses=0.0,
)
@given(
    layers=needs,
    num_slots=st.integers(1, 8),
    seed=st.integers(0, 2**32),
    interrupts=st.sampled_from([0.1, 0.5]),
    refuses=st.sampled_from([0.0, 0.1]),
)
def test_an_interrupt_while_waiting_loses_no_slot(layers, num_slots, seed, interrupts, refuses):
    # Ctrl-C arrives where the engine waits, also a second one, while it cleans up.
    stage = Stage(seed, num_slots, fails=0.1, interrupts=interrupts, refuses=refuses)
    for layer_idx, keys in passes(stage, layers):
        with suppress(KeyboardInterrupt, TransferError), stage.acquire(keys) as acquisition:
            stage.foresee(layer_idx)
            for _ in acquisition.waves():
                pass
        stage.check_slots()
        loading = {key for key in KEYS if stage.cache.state(key) is SlotState.LOADING}
        assert loading == set(stage.prefetcher._in_flight)
    stage.check_released()


@settings(max_examples=60, deadline=None)
@given(layers=needs, num_slots=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_leaving_early_gives_everything_back(layers, num_slots, seed):
    stage = Stage(seed, num_slots, fails=0.1)
    for layer_idx, keys in passes(stage, layers):
        with stage.acquire(keys) as acquisition:
            stage.foresee(layer_idx)
            if stage.fate.random.random() < 0.7:
                with suppress(TransferError):
                    next(acquisition.waves())
        stage.check_slots()
    stage.check_released()


def test_resident_experts_are_handed_out_before_anything_is_waited_for():
    stage = Stage(0, 4, mode="off")
    first, second = ExpertKey(0, 1), ExpertKey(0, 3)
    with stage.acquire([first]) as acquisition:
        assert [key for wave in acquisition.waves() for key, _ in wave] == [first]
    with stage.acquire([first, second]) as acquisition:
        wave = next(acquisition.waves())
        assert [key for key, _ in wave] == [first]
        assert stage.cache.state(second) is SlotState.LOADING
    assert (stage.traffic.hits_resident, stage.traffic.misses) == (1, 2)


def test_a_failed_prefetch_is_read_on_demand_and_counted():
    stage = Stage(0, 4)
    key = ExpertKey(1, 2)
    probability = np.zeros((1, SHAPE.num_experts), dtype=np.float32)
    probability[0, 2] = 0.95
    stage.prefetcher.offer(Forecast(0, 1, 2, probability))
    stage.prefetcher.advance(0, 0)
    assert stage.cache.state(key) is SlotState.LOADING
    acquisition = stage.acquire([key])
    with acquisition:
        stage.fate._manual.fail(stage.fate._manual.pending[0])
        assert [key for wave in acquisition.waves() for key, _ in wave] == [key]
    assert acquisition.num_failed_prefetches == 1
    assert (stage.traffic.late_hits, stage.traffic.bytes_on_demand) == (1, 1)
    stage.check_released()


def test_an_expert_that_is_read_ahead_while_it_waits_for_a_slot_is_taken_from_there():
    # No slot is left for the last expert; then a prefetch fails, and the prefetcher takes that slot
    # for the same expert, which a forecast wants for the next step.
    stage = Stage(0, 4)

    def wanted(step, layer_idx, *experts):
        probability = np.zeros((1, SHAPE.num_experts), dtype=np.float32)
        probability[0, list(experts)] = 0.95
        stage.prefetcher.offer(Forecast(step, layer_idx, layer_idx + 1, probability))

    wanted(0, 2, 0)
    stage.prefetcher.advance(0, 0)
    (doomed,) = stage.fate._manual.pending
    keys = [ExpertKey(1, e) for e in range(4)]
    with stage.acquire(keys) as acquisition:
        assert stage.cache.state(keys[3]) is None
        stage.fate._manual.fail(doomed)
        wanted(0, 2)
        wanted(1, 1, 3)
        stage.prefetcher.advance(0, 1)
        assert stage.cache.state(keys[3]) is SlotState.LOADING
        got = [key for wave in acquisition.waves() for key, _ in wave]
    assert sorted(got) == keys
    stage.check_released()


@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_more_experts_than_slots_come_in_waves(num_slots):
    stage = Stage(1, num_slots, mode="off")
    keys = [ExpertKey(0, e) for e in range(NUM_EXPERTS)]
    with stage.acquire(keys) as acquisition:
        waves = list(acquisition.waves())
    assert sum(map(len, waves)) == NUM_EXPERTS
    assert len(waves) >= -(-NUM_EXPERTS // num_slots)
    stage.check_released()


def test_time_is_counted_as_stall_only_while_waiting():
    stage = Stage(0, 4, mode="off")
    key = ExpertKey(0, 0)
    with stage.acquire([key]) as cold:
        list(cold.waves())
    with stage.acquire([key]) as warm:
        list(warm.waves())
    assert cold.stall_s > 0.0
    assert warm.stall_s == 0.0

"""ExpertCache against a naive model, under every eviction policy, and the eviction policies against
their definitions."""

import math
import random
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from naive_partition import NaivePartition

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.runtime.experts.cache import ExpertCache, Kind, Lease, SlotState
from outrider.runtime.experts.eviction import (
    EVICTIONS,
    HALF_LIFE_TOKENS,
    WARMUP_TOKENS,
    LruEviction,
    make_eviction,
)

SHAPE = ModelShape(
    num_moe_layers=3, num_experts=4, top_k=2, hidden_size=8, expert_size=8, fingerprint=""
)
KEYS = [ExpertKey(layer_idx, expert_idx) for layer_idx in range(3) for expert_idx in range(4)]
WARMUP_USES = WARMUP_TOKENS * SHAPE.top_k * SHAPE.num_moe_layers


@dataclass
class Held:
    slot: int
    is_ready: bool
    is_unused_prefetch: bool
    is_ahead: bool
    num_pins: int = 0


class PolicyDefinition:
    """What each policy promises, recomputed from the whole history at every eviction."""

    def __init__(self, name: str, num_slots: int) -> None:
        # That is what it is as long as it is told of nothing.
        self.name = "layer-ucp" if name == "forecast" else name
        self.num_slots = num_slots
        self.now = 0
        self.last_seen: dict[ExpertKey, int] = {}
        self.uses: dict[ExpertKey, list[int]] = defaultdict(list)
        self.layer_clock: dict[int, int] = defaultdict(int)
        self.num_uses = 0
        self.partition = NaivePartition(SHAPE, num_slots)

    def admit(self, key: ExpertKey) -> None:
        self.now += 1
        self.last_seen[key] = self.now

    def use(self, key: ExpertKey, is_held: bool) -> None:
        self.now += 1
        self.partition.use(key)
        if is_held:
            self.last_seen[key] = self.now
        if self.name != "static" or self.num_uses < WARMUP_USES:
            self.layer_clock[key.layer_idx] += 1
            self.uses[key].append(self.layer_clock[key.layer_idx])
        self.num_uses += 1

    def frequency(self, key: ExpertKey) -> float:
        if self.name == "static":
            return len(self.uses[key])
        half_life = HALF_LIFE_TOKENS * SHAPE.top_k
        return math.fsum(2.0 ** (tick / half_life) for tick in self.uses[key])

    def worst(self, candidates: set[ExpertKey]) -> set[ExpertKey]:
        """The keys that may be chosen among `candidates`: several if they tie."""
        if not candidates:
            return set()
        if self.name.endswith("lru"):
            return {min(candidates, key=self.last_seen.__getitem__)}
        least = min(map(self.frequency, candidates))
        return {key for key in candidates if self.frequency(key) <= least * (1 + 1e-9)}

    def victims(
        self, incoming: ExpertKey, held: set[ExpertKey], evictable: set[ExpertKey]
    ) -> set[ExpertKey]:
        if self.name == "static" and self.num_uses >= WARMUP_USES:
            ranked = sorted(self.uses, key=lambda key: (-len(self.uses[key]), key))
            hot = set(ranked[: self.num_slots - min(SHAPE.top_k, (self.num_slots + 1) // 2)])
            if hot and evictable - hot:
                return {min(evictable - hot, key=self.last_seen.__getitem__)}
            return self.worst(evictable)
        if not self.name.startswith("layer-"):
            return self.worst(evictable)
        share = Fraction(self.num_slots, SHAPE.num_moe_layers)
        quotas = (
            self.partition.quotas
            if self.name == "layer-ucp"
            else [
                math.floor(share * (layer_idx + 1)) - math.floor(share * layer_idx)
                for layer_idx in range(SHAPE.num_moe_layers)
            ]
        )
        excess = {
            layer_idx: sum(key.layer_idx == layer_idx for key in held) - quotas[layer_idx]
            for layer_idx in range(SHAPE.num_moe_layers)
        }
        own = {key for key in evictable if key.layer_idx == incoming.layer_idx}
        if excess[incoming.layer_idx] >= 0 and own:
            return self.worst(own)
        layers = {key.layer_idx for key in evictable}
        most = max((excess[layer_idx] for layer_idx in layers), default=0)
        return set().union(
            *(
                self.worst({key for key in evictable if key.layer_idx == layer_idx})
                for layer_idx in layers
                if excess[layer_idx] == most
            )
        )


class CacheMachine(RuleBasedStateMachine):
    policy = "lru"

    @initialize(num_slots=st.integers(1, 9), limit=st.none() | st.integers(0, 4))
    def build(self, num_slots: int, limit: int | None) -> None:
        self.num_slots = num_slots
        eviction = EVICTIONS[self.policy](SHAPE, num_slots)
        self.cache = ExpertCache(num_slots, eviction=eviction, prefetch_limit=limit)
        self.limit = num_slots // 4 if limit is None else limit
        self.definition = PolicyDefinition(self.policy, num_slots)
        self.held: dict[ExpertKey, Held] = {}
        self.leases: list[tuple[Lease, set[ExpertKey]]] = []
        self.num = defaultdict(int)

    def loading(self) -> list[ExpertKey]:
        return sorted(key for key, held in self.held.items() if not held.is_ready)

    def ready(self) -> list[ExpertKey]:
        return sorted(key for key, held in self.held.items() if held.is_ready)

    @rule(
        key=st.sampled_from(KEYS),
        kind=st.sampled_from(Kind),
        keep=st.frozensets(st.sampled_from(KEYS), max_size=6),
    )
    def reserve(self, key: ExpertKey, kind: Kind, keep: frozenset[ExpertKey]) -> None:
        if key in self.held:
            with pytest.raises(ValueError, match="already"):
                self.cache.reserve(key, kind, keep=keep)
            return
        is_prefetch = kind is Kind.PREFETCH
        unpinned = {key for key, held in self.held.items() if held.is_ready and held.num_pins == 0}
        candidates = unpinned - keep or (set() if is_prefetch else unpinned)
        slot = self.cache.reserve(key, kind, keep=keep)
        num_ahead = sum(held.is_ahead for held in self.held.values())
        if is_prefetch and num_ahead >= self.limit:
            assert slot is None
        elif len(self.held) < self.num_slots:
            assert slot in set(range(self.num_slots)) - {h.slot for h in self.held.values()}
        elif not candidates:
            assert slot is None
        else:
            gone = [other for other in self.held if self.cache.state(other) is None]
            assert len(gone) == 1
            assert gone[0] in self.definition.victims(key, set(self.held), candidates)
            held = self.held.pop(gone[0])
            assert slot == held.slot
            self.num["evictions"] += 1
            self.num["prefetch_wasted"] += held.is_unused_prefetch
        if slot is not None:
            self.held[key] = Held(slot, False, is_prefetch, is_prefetch)
            self.definition.admit(key)
            self.num["prefetch_issued"] += is_prefetch

    @rule(key=st.sampled_from(KEYS))
    def fetch(self, key: ExpertKey) -> None:
        """A miss from beginning to end: what makes evictions frequent."""
        if key not in self.held:
            self.reserve(key, Kind.ON_DEMAND, keep=frozenset())
            if key in self.held:
                self.cache.commit(self.held[key].slot)
                self.held[key].is_ready = True
        self.use(key, times=1)

    @precondition(lambda self: self.loading())
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        held = self.held[data.draw(st.sampled_from(self.loading()))]
        self.cache.commit(held.slot)
        held.is_ready, held.is_ahead = True, False
        for refused in (self.cache.commit, self.cache.abandon, self.cache.promote):
            with pytest.raises(ValueError, match="not LOADING"):
                refused(held.slot)

    @precondition(lambda self: self.loading())
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        held = self.held.pop(data.draw(st.sampled_from(self.loading())))
        self.cache.abandon(held.slot)
        self.num["prefetch_cancelled"] += held.is_unused_prefetch

    @precondition(lambda self: self.loading())
    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        held = self.held[data.draw(st.sampled_from(self.loading()))]
        self.cache.promote(held.slot)
        held.is_ahead = False

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4))
    def pin(self, keys: list[ExpertKey]) -> None:
        if set(keys) <= set(self.ready()):
            lease = self.cache.pin(keys)
            assert lease.slots == {key: self.held[key].slot for key in keys}
            self.leases.append((lease, set(keys)))
            for key in set(keys):
                self.held[key].num_pins += 1
        else:
            with pytest.raises(KeyError):
                self.cache.pin(keys)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), keys=st.lists(st.sampled_from(KEYS), max_size=3))
    def add(self, data: st.DataObject, keys: list[ExpertKey]) -> None:
        lease, pinned = data.draw(st.sampled_from(self.leases))
        if set(keys) <= set(self.ready()):
            lease.add(*keys)
            for key in set(keys) - pinned:
                self.held[key].num_pins += 1
                pinned.add(key)
        else:
            with pytest.raises(KeyError):
                lease.add(*keys)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.leases) - 1))
        lease, pinned = self.leases.pop(index)
        with lease:
            pass
        lease.release()
        for key in pinned:
            self.held[key].num_pins -= 1

    @rule(key=st.sampled_from(KEYS), times=st.sampled_from([1, 1, 1, 5, 300]))
    def use(self, key: ExpertKey, times: int) -> None:
        for _ in range(times):
            held = self.held.get(key)
            is_first = held is not None and held.is_unused_prefetch
            assert self.cache.record_use(key) is is_first
            if held is not None:
                held.is_unused_prefetch = False
            self.num["prefetch_used"] += is_first
            self.num["uses"] += 1
            self.definition.use(key, held is not None)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.cache.check()
        for key in KEYS:
            held = self.held.get(key)
            assert self.cache.slot_of(key) == (held and held.slot)
            assert self.cache.lookup(key) == (held.slot if held and held.is_ready else None)
            expected = held and (SlotState.READY if held.is_ready else SlotState.LOADING)
            assert self.cache.state(key) == expected
        assert self.cache.resident() == {key: self.held[key].slot for key in self.ready()}
        assert self.cache.num_free == self.num_slots - len(self.held)
        assert self.cache.num_loading == len(self.loading())
        for name in self.cache.counters.__slots__:
            assert getattr(self.cache.counters, name) == self.num[name], name


@pytest.mark.parametrize("policy", list(EVICTIONS))
def test_cache_agrees_with_a_naive_model(policy: str) -> None:
    machine = type("Machine", (CacheMachine,), {"policy": policy})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=50, stateful_step_count=40, deadline=None)
    )


@pytest.mark.parametrize("num_slots", [1, 2, 5, 8])
@pytest.mark.parametrize("policy", list(EVICTIONS))
def test_policies_keep_to_their_definition_over_long_runs(policy: str, num_slots: int) -> None:
    machine = type("Machine", (CacheMachine,), {"policy": policy})()
    machine.build(num_slots, None)
    generator = random.Random(num_slots)
    for step in range(2000):
        # Usage is skewed, and drifts: old counts must lose their weight.
        weights = [1.0 / (1 + (index + step // 400) % 12) for index in range(12)]
        machine.fetch(generator.choices(KEYS, weights)[0])
    machine.agrees_with_the_model()
    assert machine.num["evictions"] > 100


def ready(cache: ExpertCache, *keys: ExpertKey) -> None:
    for key in keys:
        slot = cache.reserve(key, Kind.ON_DEMAND)
        assert slot is not None
        cache.commit(slot)


def make_cache(num_slots: int, **options: int) -> ExpertCache:
    return ExpertCache(num_slots, eviction=LruEviction(SHAPE, num_slots), **options)


def test_one_slot_serves_any_number_of_experts_in_waves() -> None:
    cache = make_cache(1)
    for key in KEYS:
        ready(cache, key)
        with cache.pin([key]) as lease:
            assert lease.slots == {key: 0}
            assert (
                cache.reserve(ExpertKey(0, 0) if key != KEYS[0] else KEYS[1], Kind.ON_DEMAND)
                is None
            )
        cache.check()
    assert cache.counters.evictions == len(KEYS) - 1


def test_an_expert_is_pinned_until_its_last_lease_ends() -> None:
    cache = make_cache(1)
    ready(cache, KEYS[0])
    first, second = cache.pin([KEYS[0]]), cache.pin([KEYS[0], KEYS[0]])
    second.release()
    second.release()
    assert cache.reserve(KEYS[1], Kind.ON_DEMAND) is None
    first.release()
    assert cache.reserve(KEYS[1], Kind.ON_DEMAND) == 0
    with pytest.raises(ValueError, match="released"):
        first.add(KEYS[1])


def test_a_lease_is_released_by_an_exception() -> None:
    cache = make_cache(1)
    ready(cache, KEYS[0])
    with pytest.raises(RuntimeError, match="in the block"), cache.pin([KEYS[0]]):
        raise RuntimeError("in the block")
    assert cache.reserve(KEYS[1], Kind.ON_DEMAND) == 0


def test_prefetches_leave_slots_to_misses() -> None:
    cache = make_cache(8)
    slots = [cache.reserve(key, Kind.PREFETCH) for key in KEYS[:4]]
    assert [slot is None for slot in slots] == [False, False, True, True]
    assert cache.reserve(KEYS[5], Kind.ON_DEMAND) is not None
    assert slots[0] is not None
    cache.promote(slots[0])
    assert cache.reserve(KEYS[6], Kind.PREFETCH) is not None, "a late hit frees a place"


def test_check_notices_damage() -> None:
    for damage in (
        lambda cache: cache._free.append(0),
        lambda cache: cache._entries.pop(KEYS[0]),
        lambda cache: setattr(cache._entries[KEYS[0]], "num_pins", -1),
        lambda cache: setattr(cache._entries[KEYS[0]], "slot", 1),
        lambda cache: setattr(cache, "_num_loading", 1),
        lambda cache: setattr(cache.counters, "prefetch_issued", 1),
    ):
        cache = make_cache(3)
        ready(cache, KEYS[0])
        cache.check()
        damage(cache)
        with pytest.raises(AssertionError, match="broken"):
            cache.check()


def test_a_policy_that_names_a_pinned_victim_is_caught() -> None:
    class Careless(LruEviction):
        def victim(self, incoming, evictable):
            return KEYS[0]

    cache = ExpertCache(1, eviction=Careless(SHAPE, 1))
    ready(cache, KEYS[0])
    with cache.pin([KEYS[0]]), pytest.raises(RuntimeError, match="may not be evicted"):
        cache.reserve(KEYS[1], Kind.ON_DEMAND)


def test_a_cache_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ExpertCache(0, eviction=make_eviction("lru", shape=SHAPE, num_slots=1))

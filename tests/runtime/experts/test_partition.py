"""layer-ucp: quotas against their definition, what they must never be, and what they gain."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from naive_partition import NaivePartition

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.runtime.experts.cache import ExpertCache, Kind
from outrider.runtime.experts.eviction import EvictionPolicy, make_eviction
from outrider.runtime.experts.partition import LayerUcpEviction, LayerUtility


def shape_of(layers: int, experts: int, top_k: int) -> ModelShape:
    return ModelShape(layers, experts, top_k, 8, 8, "")


def routing(shape: ModelShape, tokens: int, *, skews: list[float], seed: int) -> np.ndarray:
    """Experts of each token and layer, ascending [T, L, k]; a layer of skew 0 takes any alike."""
    generator = np.random.default_rng(seed)
    size = (tokens, shape.num_moe_layers, shape.num_experts)
    utility = np.array(skews)[:, None] * generator.normal(size=size[1:])
    chosen = np.argsort(-(utility + generator.gumbel(size=size)), axis=-1)[..., : shape.top_k]
    return np.sort(chosen, axis=-1)


def serve(policy: EvictionPolicy, ids: np.ndarray, num_slots: int, *, together: int = 1) -> int:
    """Misses on demand; so many sequences at once, each its part of the tokens."""
    cache = ExpertCache(num_slots, eviction=policy)
    misses = 0
    for step, rows in enumerate(np.split(ids, len(ids) // together)):
        for layer_idx in range(ids.shape[1]):
            cache.advance(step, layer_idx)
            keys = [ExpertKey(layer_idx, one) for one in np.unique(rows[:, layer_idx]).tolist()]
            missing = [key for key in keys if cache.lookup(key) is None]
            for key in keys:
                cache.record_use(key)
            lease = cache.pin([key for key in keys if key not in missing])
            for key in missing:
                slot = cache.reserve(key, Kind.ON_DEMAND)
                if slot is None:
                    lease.release()
                    slot = cache.reserve(key, Kind.ON_DEMAND)
                assert slot is not None
                cache.commit(slot)
            lease.release()
            misses += len(missing)
    return misses


@settings(max_examples=25, deadline=None)
@example(layers=4, experts=9, share=0.6875, together=2, seed=1046604)
@given(
    layers=st.integers(2, 4),
    experts=st.sampled_from([4, 9, 40]),
    share=st.floats(0.1, 0.95),
    together=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_quotas_are_what_their_definition_says(layers, experts, share, together, seed) -> None:
    shape = shape_of(layers, experts, 2)
    num_slots = max(1, int(share * layers * experts))
    policy, naive = LayerUcpEviction(shape, num_slots), NaivePartition(shape, num_slots)
    skews = np.linspace(0.0, 3.0, layers).tolist()
    for rows in np.split(routing(shape, 60 * together, skews=skews, seed=seed), 60):
        for layer_idx in range(layers):
            for expert_idx in np.unique(rows[:, layer_idx]).tolist():
                key = ExpertKey(layer_idx, expert_idx)
                policy.touch(key)
                naive.use(key)
                if naive.is_close:
                    return
                assert list(policy.quotas) == naive.quotas


@settings(max_examples=50, deadline=None)
@given(
    num_slots=st.integers(1, 24),
    uses=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), min_size=1, max_size=12),
    times=st.integers(1, 60),
)
def test_quotas_use_every_slot_and_starve_no_layer(num_slots, uses, times) -> None:
    """Whatever is used how often, one layer alone included."""
    shape = shape_of(3, 8, 2)
    policy = LayerUcpEviction(shape, num_slots)
    for _ in range(times):
        for layer_idx, expert_idx in uses:
            before = policy.quotas
            policy.touch(ExpertKey(layer_idx, expert_idx))
            assert sum(policy.quotas) == num_slots
            assert min(policy.quotas) >= min(2 * shape.top_k, num_slots // 3)
            assert max(policy.quotas) <= shape.num_experts
            moved = [new - old for new, old in zip(policy.quotas, before, strict=True)]
            assert set(moved) <= {-1, 0, 1}, "a slot at a time"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), count=st.integers(1, 10))
def test_uses_by_rank_are_the_hits_of_keeping_the_most_frequent(seed, count) -> None:
    """Where nothing is forgotten, for every size: what one look at the ranks tells of all of them
    is what a cache of that size would have counted."""
    generator = np.random.default_rng(seed)
    utility = LayerUtility(10, half_life=1e12)
    counts: dict[ExpertKey, float] = {}
    hits = 0
    for step in range(80):
        used = [ExpertKey(0, int(one)) for one in generator.choice(10, 2, p=_SKEWED, replace=False)]
        kept = sorted(counts, key=lambda key: -counts[key])[:count]
        hits += sum(key in kept for key in used)
        utility.begin(counts.values())
        for key in used:
            utility.count(counts.get(key, -math.inf))
        # Frequencies differ, as decayed ones do: a tie would leave open who is kept.
        counts |= {key: counts.get(key, 0.0) + 1.0 + step * 1e-6 for key in used}
        counts |= {key: counts[key] + key.expert_idx * 1e-9 for key in used}
    assert sum(utility.loss(size) for size in range(1, count + 1)) == pytest.approx(hits)
    assert [utility.gain(size) for size in range(9)] == [
        utility.loss(size) for size in range(1, 10)
    ]


_SKEWED = np.arange(1, 11) / 55


def test_slots_go_where_they_serve_most() -> None:
    """A layer that takes any expert alike needs all of them; one that prefers some does not."""
    shape = shape_of(4, 32, 4)
    ids = routing(shape, 1200, skews=[0.0, 0.0, 2.5, 2.5], seed=1)
    for num_slots, fewer in ((96, 0.15), (112, 0.3)):
        even = serve(make_eviction("layer-lfu", shape=shape, num_slots=num_slots), ids, num_slots)
        policy = LayerUcpEviction(shape, num_slots)
        assert serve(policy, ids, num_slots) < (1.0 - fewer) * even
        assert min(policy.quotas[:2]) > max(policy.quotas[2:])


def test_layers_alike_keep_about_an_even_share() -> None:
    shape = shape_of(4, 32, 4)
    ids = routing(shape, 1200, skews=[1.0] * 4, seed=2)
    for num_slots in (16, 32, 64, 96):
        even = serve(make_eviction("layer-lfu", shape=shape, num_slots=num_slots), ids, num_slots)
        policy = LayerUcpEviction(shape, num_slots)
        assert serve(policy, ids, num_slots) < 1.03 * even, num_slots


def test_quotas_follow_the_text() -> None:
    shape = shape_of(2, 32, 4)
    first = routing(shape, 1000, skews=[0.0, 3.0], seed=3)
    policy = LayerUcpEviction(shape, 44)
    quotas = []
    for ids in (first, first[:, ::-1], first):
        serve(policy, ids, 44)
        quotas.append(policy.quotas[0])
    assert [one > 22 for one in quotas] == [True, False, True]
    assert all(abs(one - other) > 5 for one, other in pairwise(quotas))


def test_a_layer_keeps_what_one_pass_of_several_sequences_needs() -> None:
    """One sequence moves 12 of 20 slots from the last layer; six at once need 8 experts there and
    17 of 32 in the first."""
    shape = shape_of(3, 32, 4)
    ids = routing(shape, 3000, skews=[0.0, 1.0, 3.0], seed=4)
    policy = LayerUcpEviction(shape, 60)
    serve(policy, ids, 60)
    assert policy.quotas[2] < 12
    misses = serve(policy, ids, 60, together=6)
    assert policy.quotas[2] >= 14 and min(policy.quotas[:2]) >= 20
    even = make_eviction("layer-lfu", shape=shape, num_slots=60)
    assert misses < 1.01 * serve(even, ids, 60, together=6)


def test_nothing_is_measured_where_nothing_can_be_gained() -> None:
    for shape, num_slots in ((shape_of(3, 8, 2), 24), (shape_of(1, 8, 2), 4)):
        policy = LayerUcpEviction(shape, num_slots)
        quotas = policy.quotas
        for one in range(500):
            policy.touch(ExpertKey(one % shape.num_moe_layers, one % 7))
        assert policy.quotas == quotas


def test_one_history_gives_one_split() -> None:
    shape = shape_of(3, 16, 2)
    ids = routing(shape, 300, skews=[0.0, 1.0, 3.0], seed=5)
    policies = [LayerUcpEviction(shape, 30) for _ in range(2)]
    misses = [serve(policy, ids, 30) for policy in policies]
    assert misses[0] == misses[1] and policies[0].quotas == policies[1].quotas

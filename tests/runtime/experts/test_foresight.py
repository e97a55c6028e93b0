"""Eviction that looks ahead: against what its worths mean, and Belady against the best there is."""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.predictors.base import Forecast
from outrider.runtime.experts.cache import ExpertCache, Kind
from outrider.runtime.experts.decisions import Decisions
from outrider.runtime.experts.eviction import make_eviction
from outrider.runtime.experts.foresight import (
    DISCOUNT,
    RATE_HALF_LIFE_TOKENS,
    BeladyEviction,
    ForecastEviction,
)

SHAPE = ModelShape(3, 5, 2, 8, 8, "")
KEYS = [ExpertKey(layer_idx, expert_idx) for layer_idx in range(3) for expert_idx in range(5)]


@pytest.fixture(autouse=True, scope="module", params=["native", "numpy"])
def summed(request: pytest.FixtureRequest) -> Iterator[None]:
    """All of this file with the native sums, and with numpy's."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(Decisions, "of", lambda *_: None)
        elif Decisions.of(1, 1) is None:
            pytest.skip("the native library is not built")
        yield


def table(seed: int, rows: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, SHAPE.num_experts), dtype=np.float32)


class Past:
    """Decayed counts from the whole history, anew each time."""

    def __init__(self) -> None:
        self.uses: dict[int, list[tuple[int, int]]] = defaultdict(list)

    def use(self, key: ExpertKey, step: int) -> None:
        self.uses[key.layer_idx].append((step, key.expert_idx))

    def rate(self, key: ExpertKey) -> float:
        half_life = RATE_HALF_LIFE_TOKENS * SHAPE.top_k
        ages = list(enumerate(reversed(self.uses[key.layer_idx])))
        total = sum(2.0 ** (-age / half_life) for age, _ in ages)
        own = sum(2.0 ** (-age / half_life) for age, (_, e) in ages if e == key.expert_idx)
        return min(1.0, SHAPE.top_k * own / total) if total else 0.0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    layer_idx=st.integers(-1, 2),
    uses=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(KEYS)), max_size=30),
    has_third=st.booleans(),
)
def test_worth_is_the_discounted_chance_of_the_next_use(seed, layer_idx, uses, has_third):
    policy = ForecastEviction(SHAPE, 6)
    past = Past()
    for step, key in sorted(uses, key=lambda use: use[0]):
        policy.advance(step, key.layer_idx)
        policy.touch(key)
        past.use(key, step)
    tables = {step: table(seed + step) for step in ((3, 4, 5) if has_third else (3, 4))}
    policy.advance(3, -1)
    for step, probability in tables.items():
        policy.foresee(Forecast(step, 0, 3, probability))
    policy.advance(3, layer_idx)
    worths = policy.worths()
    assert worths is not None
    for key in KEYS:
        is_ahead = key.layer_idx > layer_idx
        expected, unused = 0.0, 1.0
        for turn in range(400):
            step = 3 + turn + (not is_ahead)
            rate = past.rate(key)
            chance = float(tables[step][key]) if step in tables and turn < 2 else rate
            moments = 3 * (step - 3) + key.layer_idx - layer_idx
            expected += unused * chance * DISCOUNT ** (moments / 3)
            unused *= 1.0 - chance
        assert worths[key] == pytest.approx(expected, rel=1e-4, abs=1e-6), key


def test_the_newest_forecast_counts_and_one_of_a_step_gone_by_does_not() -> None:
    policy = ForecastEviction(SHAPE, 6)
    policy.advance(7, -1)
    for step in (7, 8):
        policy.foresee(Forecast(step, 0, 3, table(step)))
    before = policy.worths()
    policy.foresee(Forecast(6, 0, 3, table(99)))
    assert np.array_equal(policy.worths(), before)
    policy.foresee(Forecast(7, 1, 2, np.ones((1, 5), np.float32)))
    after = policy.worths()
    assert after is not None and before is not None
    assert (after[1] == DISCOUNT ** (2 / 3)).all(), "certain, two of three layers from now"
    assert np.array_equal(after[[0, 2]], before[[0, 2]])


def test_without_forecasts_of_the_next_token_it_goes_by_frequency_in_the_layer() -> None:
    generator = random.Random(3)
    policy, plain = ForecastEviction(SHAPE, 7), make_eviction("layer-ucp", shape=SHAPE, num_slots=7)
    caches = [ExpertCache(7, eviction=policy), ExpertCache(7, eviction=plain)]
    for step in range(300):
        for layer_idx in range(3):
            for expert_idx in sorted(generator.sample(range(5), 2)):
                for cache in caches:
                    cache.advance(step, layer_idx)
                    key = ExpertKey(layer_idx, expert_idx)
                    if cache.lookup(key) is None:
                        slot = cache.reserve(key, Kind.ON_DEMAND)
                        assert slot is not None
                        cache.commit(slot)
                    cache.record_use(key)
            assert caches[0].resident() == caches[1].resident()
    assert policy.worths() is None


def test_what_this_token_will_need_is_spared_while_others_may_go() -> None:
    policy = ForecastEviction(SHAPE, 4)
    policy.advance(1, 0)
    keys = [ExpertKey(2, 0), ExpertKey(2, 1), ExpertKey(2, 2)]
    for key in keys:
        policy.admit(key)
    probability = np.zeros((1, 5), np.float32)
    probability[0, [0, 2]] = 0.9
    policy.foresee(Forecast(1, 2, 3, probability))
    assert policy.victim(ExpertKey(1, 0), lambda key: True) == keys[1]
    assert policy.victim(ExpertKey(1, 0), lambda key: key != keys[1]) in (keys[0], keys[2])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), num_slots=st.integers(1, 12), is_foreseen=st.booleans())
def test_the_victim_is_an_evictable_expert_of_least_worth(seed, num_slots, is_foreseen):
    generator = random.Random(seed)
    policy = ForecastEviction(SHAPE, num_slots)
    held: set[ExpertKey] = set()
    for step in range(12):
        for layer_idx in range(-1, 3):
            policy.advance(step, layer_idx)
            if is_foreseen and layer_idx < 0:
                policy.foresee(Forecast(step, 0, 3, table(seed + step)))
                policy.foresee(Forecast(step + 1, 0, 3, table(seed + step + 1)))
            is_ranked = False
            for _ in range(3):
                evictable = {key for key in held if generator.random() < 0.7}
                victim = policy.victim(KEYS[0], evictable.__contains__)
                assert (victim is None) == (not evictable)
                worths = policy.worths()
                assert (worths is not None) is is_foreseen
                if victim is not None and worths is not None and not is_ranked:
                    assert worths[victim] == min(worths[key] for key in evictable)
                if victim is not None and generator.random() < 0.5:
                    policy.discard(victim)
                    held.discard(victim)
                incoming = generator.choice(KEYS)
                if incoming not in held and len(held) < num_slots:
                    policy.admit(incoming)
                    held.add(incoming)
                    is_ranked = True  # what was admitted since comes last, whatever it is worth
            policy.touch(generator.choice(KEYS))


def play(policy, uses: list[ExpertKey], num_slots: int) -> int:
    """Misses of one cache on these uses."""
    cache = ExpertCache(num_slots, eviction=policy)
    misses = 0
    for key in uses:
        cache.record_use(key)
        if cache.lookup(key) is None:
            misses += 1
            slot = cache.reserve(key, Kind.ON_DEMAND)
            assert slot is not None
            cache.commit(slot)
    return misses


def fewest_misses(uses: list[ExpertKey], num_slots: int) -> int:
    """Of every possible choice of victims, by looking at all reachable contents."""
    costs = {frozenset(): 0}
    for key in uses:
        after: dict[frozenset, int] = {}
        for held, cost in costs.items():
            if key in held:
                options = [(held, cost)]
            elif len(held) < num_slots:
                options = [(held | {key}, cost + 1)]
            else:
                options = [((held - {gone}) | {key}, cost + 1) for gone in held]
            for contents, total in options:
                after[contents] = min(total, after.get(contents, total))
        costs = after
    return min(costs.values())


@settings(max_examples=60, deadline=None)
@given(uses=st.lists(st.sampled_from(KEYS[:7]), max_size=20), num_slots=st.integers(1, 4))
def test_belady_misses_as_little_as_any_policy_can(uses, num_slots):
    policy = BeladyEviction(SHAPE, num_slots, future=uses)
    assert play(policy, uses, num_slots) == fewest_misses(uses, num_slots)


def test_belady_refuses_a_use_that_it_was_not_told_of() -> None:
    policy = BeladyEviction(SHAPE, 2, future=[KEYS[0], KEYS[0]])
    policy.touch(KEYS[0])
    with pytest.raises(ValueError, match="future"):
        policy.touch(KEYS[1])


def test_knowing_more_misses_less() -> None:
    """Frequency, then the truth about this token and the next, then the whole future."""
    generator = np.random.default_rng(5)
    shape = ModelShape(4, 16, 3, 8, 8, "")
    utility = generator.normal(size=(4, 16))
    noise = generator.gumbel(size=(402, 4, 16))
    ids = np.sort(np.argsort(-(utility + noise), axis=-1)[..., :3], axis=-1)

    def misses(policy, is_told: bool) -> int:
        cache = ExpertCache(16, eviction=policy)
        count = 0
        for step in range(400):
            cache.advance(step, -1)
            for ahead in (0, 1) if is_told else ():
                truth = np.zeros((4, 16), np.float32)
                np.put_along_axis(truth, ids[step + ahead], 1.0, axis=1)
                cache.foresee(Forecast(step + ahead, 0, 4, truth))
            for layer_idx in range(4):
                cache.advance(step, layer_idx)
                for expert_idx in ids[step, layer_idx].tolist():
                    key = ExpertKey(layer_idx, expert_idx)
                    cache.record_use(key)
                    if cache.lookup(key) is None:
                        count += 1
                        slot = cache.reserve(key, Kind.ON_DEMAND)
                        assert slot is not None
                        cache.commit(slot)
        return count

    future = [
        ExpertKey(layer_idx, int(expert_idx))
        for token, layer_idx in itertools.product(ids[:400], range(4))
        for expert_idx in token[layer_idx]
    ]
    blind = misses(ForecastEviction(shape, 16), False)
    told = misses(ForecastEviction(shape, 16), True)
    best = misses(BeladyEviction(shape, 16, future=future), False)
    assert best < told < blind - 0.3 * (blind - best)

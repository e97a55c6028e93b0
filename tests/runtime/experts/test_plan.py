"""What is to be read ahead, by native code and by numpy, against its definition."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.runtime.experts.cache import ABSENT, ARRIVING
from outrider.runtime.experts.decisions import Decisions
from outrider.runtime.experts.plan import Candidate, Planner


def by_definition(tables, slots, *, position, last, reads_a_moment, queued, price):
    """One expert at a time."""
    num_layers, num_experts = slots.shape
    found = []
    for step, table in tables.items():
        for layer_idx, expert_idx in np.ndindex(num_layers, num_experts):
            moment = step * num_layers + layer_idx
            chance = float(table[layer_idx, expert_idx])
            lead = (moment - position) * reads_a_moment - queued
            share = min(lead, 1.0)
            pays = chance * share > (1.0 - chance) * price
            is_absent = slots[layer_idx, expert_idx] == ABSENT
            if is_absent and position < moment <= last and share >= 0.5 and pays:
                found.append(Candidate(ExpertKey(layer_idx, expert_idx), step, lead, chance))
    tenths = {one: float(np.rint(np.float32(one.chance) * np.float32(10.0))) for one in found}
    return sorted(found, key=lambda one: (one.step, -tenths[one], one.lead, one.chance, one.key))


@pytest.fixture(scope="module", params=["native", "numpy"])
def has_native(request: pytest.FixtureRequest) -> bool:
    if request.param == "native" and Decisions.of(1, 1) is None:
        pytest.skip("the native library is not built")
    return request.param == "native"


@settings(max_examples=150, deadline=None)
@given(
    layers=st.integers(1, 5),
    experts=st.integers(1, 9),
    steps=st.lists(st.integers(0, 3), unique=True, max_size=3),
    position=st.integers(-1, 18),
    reach=st.integers(1, 12),
    speed=st.sampled_from([0.1, 0.5, 0.7, 3.0, 1e9]),
    queued=st.sampled_from([0.0, 0.4, 2.0]),
    price=st.sampled_from([0.15, 0.42, 8.0]),
    seed=st.integers(0, 2**20),
)
def test_what_is_due_and_in_which_order(
    has_native, layers, experts, steps, position, reach, speed, queued, price, seed
) -> None:
    random = np.random.default_rng(seed)
    slots = random.choice([ABSENT, ABSENT, ARRIVING, 0, 7], (layers, experts)).astype(np.int64)
    # Few values, so that some are alike.
    tables = {
        step: random.choice([0.0, 0.04, 0.05, 0.35, 0.36, 0.449, 0.9, 1.0], slots.shape).astype(
            np.float32
        )
        for step in steps
    }
    planner = Planner(ModelShape(layers, experts, 1, 8, 8, ""), slots)
    if not has_native:
        planner._native = None
    moment = {
        "position": position,
        "last": position + reach,
        "reads_a_moment": speed,
        "queued": queued,
        "price": price,
    }
    found = planner.due(tables, **moment)
    expected = by_definition(tables, slots, **moment)
    assert [one.key for one in found] == [one.key for one in expected]
    assert [one.step for one in found] == [one.step for one in expected]
    for mine, its in zip(found, expected, strict=True):
        assert math.isclose(mine.lead, its.lead) and mine.chance == its.chance

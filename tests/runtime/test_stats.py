"""Counts and times: the JSON names of INTERFACES, and invariants that catch a wrong count."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.runtime.stats import (
    ExpertTraffic,
    ExpertUsage,
    GenerationStats,
    GenerationTimings,
    StepStats,
)

# As INTERFACES section 1 writes them.
TRAFFIC = [
    "lookups",
    "hits_resident",
    "hits_prefetched",
    "late_hits",
    "misses",
    "host_computed",
    "prefetch_issued",
    "prefetch_used",
    "prefetch_wasted",
    "prefetch_cancelled",
    "bytes_on_demand",
    "bytes_prefetched",
    "prefetch_used_next",  # added to them
]
TIMINGS = ["load_s", "ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s", "stall_s"]
EXPERTS = ["total", "slots", "budget_bytes", "slot_bytes", "decode", "prefill"]

SOUND = {
    "lookups": 10,
    "hits_resident": 4,
    "hits_prefetched": 2,
    "late_hits": 1,
    "misses": 3,
    "host_computed": 1,
    "prefetch_issued": 6,
    "prefetch_used": 3,
    "prefetch_wasted": 1,
    "prefetch_cancelled": 1,
    "bytes_on_demand": 300,
    "bytes_prefetched": 400,
    "prefetch_used_next": 2,
}

counts = st.fixed_dictionaries({name: st.integers(0, 2**40) for name in TRAFFIC})


def test_json_names_are_those_of_the_interface():
    assert list(ExpertTraffic().as_dict()) == TRAFFIC
    assert list(GenerationTimings().as_dict()) == TIMINGS
    usage = ExpertUsage(total=8, slots=2, budget_bytes=20, slot_bytes=10).as_dict()
    assert list(usage) == EXPERTS
    assert list(usage["decode"]) == list(usage["prefill"]) == TRAFFIC


def test_hit_rate_counts_no_late_hit():
    assert ExpertTraffic(**SOUND).hit_rate == 6 / 10
    assert ExpertTraffic().hit_rate is None


@settings(deadline=None)
@given(st.lists(counts, max_size=4))
def test_sums_are_field_by_field_and_leave_the_parts_alone(parts):
    traffics = [ExpertTraffic(**part) for part in parts]
    merged = ExpertTraffic.merge(traffics)
    for name in TRAFFIC:
        assert getattr(merged, name) == sum(part[name] for part in parts)
    assert [traffic.as_dict() for traffic in traffics] == parts
    if parts:
        doubled = traffics[0] + traffics[0]
        traffics[0].add(traffics[0])
        assert doubled == traffics[0]
        assert doubled.lookups == 2 * parts[0]["lookups"]


def test_sound_counts_pass_the_check():
    ExpertTraffic(**SOUND).check()
    ExpertTraffic().check()


@pytest.mark.parametrize(
    "change",
    [
        {"lookups": 11},
        {"hits_resident": 5},
        {"hits_prefetched": 1},
        {"late_hits": 2},
        {"misses": 2},
        {"host_computed": 4},
        {"bytes_on_demand": -1},
        {"hits_resident": -1, "lookups": 5},
    ],
    ids=str,
)
def test_check_catches_a_wrong_count(change):
    with pytest.raises(AssertionError):
        ExpertTraffic(**{**SOUND, **change}).check()


def test_fields_are_closed():
    with pytest.raises(AttributeError):
        ExpertTraffic().hits = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_rates_come_from_tokens_and_seconds():
    timings = GenerationTimings(prefill_tokens=30, prefill_s=1.5, decode_tokens=8, decode_s=2.0)
    assert timings.prefill_tokens_per_s == 20.0
    assert timings.decode_tokens_per_s == 4.0
    # A generation of one token has no decode step: unknown, not zero and not infinite.
    assert GenerationTimings().as_dict()["decode_tokens_per_s"] is None
    timings.add(GenerationTimings(load_s=3.0, ttft_s=9.0, decode_tokens=4, decode_s=1.0))
    assert timings.decode_tokens_per_s == 4.0
    assert (timings.load_s, timings.ttft_s) == (3.0, 9.0)


def test_steps_are_recorded_under_their_phase():
    stats = GenerationStats(
        GenerationTimings(), ExpertUsage(total=8, slots=2, budget_bytes=20, slot_bytes=10)
    )
    prefill, decode = ExpertTraffic(lookups=7, misses=7), ExpertTraffic(lookups=2, misses=2)
    stats.record(StepStats("prefill", 16, 0.5, 0.25, prefill))
    stats.record(StepStats("decode", 1, 0.125, 0.0625, decode))
    stats.record(StepStats("decode", 1, 0.125, 0.0, decode))
    document = stats.as_dict()
    assert document["experts"]["prefill"]["misses"] == 7
    assert document["experts"]["decode"]["misses"] == 4
    assert document["timings"]["prefill_tokens_per_s"] == 32.0
    assert document["timings"]["decode_tokens_per_s"] == 8.0
    assert document["timings"]["stall_s"] == 0.3125
    # The step's own traffic is a part of the sum, never the sum itself.
    assert prefill.lookups == 7
    assert decode.lookups == 2


def test_step_as_json():
    step = StepStats("decode", 1, 0.5, 0.25, ExpertTraffic(**SOUND)).as_dict()
    assert step == {
        "phase": "decode",
        "num_tokens": 1,
        "wall_s": 0.5,
        "stall_s": 0.25,
        "traffic": SOUND,
    }

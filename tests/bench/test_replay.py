"""Replay of planted routing: what must hold for any routing, policy, budget and forecast."""

import json
import sys
from collections import OrderedDict
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import planted_routing as planted
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outrider.bench.arms import BELADY, ROUTING_NAME, ArmSpec, run_arm
from outrider.bench.replay import COUNTS, Arm, Replay, Schedule
from outrider.bench.tiling import tile_foretold, tile_routing
from outrider.bench.timeline import timeline, write_trace
from outrider.runtime.experts.eviction import EVICTIONS

ONLINE = ("lru", "lfu", "layer-lru", "layer-lfu", "layer-ucp", "static", "forecast")
AT = {name: index for index, name in enumerate(COUNTS)}


def arm_of(policy="lru", *, slots, recorded, told=None, prefetch="off", **times) -> Arm:
    shape = recorded.shape
    return Arm(
        num_slots=slots,
        eviction=lambda: EVICTIONS[policy](shape, slots),
        foretold=told,
        prefetch=prefetch,
        carriage=times.get("carriage", planted.CARRIAGE),
        times=times.get("times", planted.TIMES),
    )


def table(recorded, arm, *, has_prompts=False):
    schedule = Schedule(recorded, prompt_tokens=planted.PROMPT, has_prompts=has_prompts)
    replay = Replay(schedule, arm)
    rows = replay.run(range(schedule.num_sequences))
    replay.cache.check()
    return replay, rows


def total(rows, name):
    return float(rows[:, AT[name]].sum())


def spec_of(recorded, policy, *, slots, predictor="none", prefetch="off", warm_from=2):
    return ArmSpec(
        policy=policy,
        predictor=predictor,
        prefetch=prefetch,
        budget=str(slots),
        num_slots=slots,
        carriage=planted.CARRIAGE,
        times=planted.TIMES,
        prompt_tokens=planted.PROMPT,
        warm_from=warm_from,
    )


def belady_misses(uses: list[list[int]], slots: int) -> int:
    """Fewest misses of any policy, by trying all of them; only for tiny routings."""
    reachable = {frozenset(): 0}
    for needed in uses:
        following: dict[frozenset[int], int] = {}
        for held, misses in reachable.items():
            missing = [key for key in needed if key not in held]
            rest = sorted(held - set(needed))
            drop = max(0, len(held) + len(missing) - slots)
            for gone in combinations(rest, drop):
                state = (held - set(gone)) | set(missing)
                count = misses + len(missing)
                if count < following.get(state, 1 << 30):
                    following[state] = count
        reachable = following
    return min(reachable.values())


@given(seed=st.integers(0, 10**6), slots=st.integers(3, 34))
@settings(max_examples=25, deadline=None)
def test_belady_is_at_least_every_online_policy(tmp_path_factory, seed, slots):
    recorded = planted.routing(seed=seed)
    folder = tmp_path_factory.mktemp("replay")
    recorded.save(folder / ROUTING_NAME)
    bound = run_arm(spec_of(recorded, BELADY, slots=slots), str(folder), None)
    told = planted.foretold(recorded, noise=0.0)
    for policy in ONLINE:
        arm = arm_of(policy, slots=slots, recorded=recorded,
                     told=told if policy == "forecast" else None)  # fmt: skip
        _, rows = table(recorded, arm)
        for part in (slice(None, 2), slice(2, None)):
            assert total(rows[part], "misses") >= total(bound[part], "misses")
            assert total(rows[part], "lookups") == total(bound[part], "lookups")


@given(seed=st.integers(0, 10**6), slots=st.integers(2, 5))
@settings(max_examples=15, deadline=None)
def test_belady_misses_as_few_as_any_policy_could(tmp_path_factory, seed, slots):
    recorded = planted.routing(seed=seed, sequences=2, length=6, layers=2, experts=4, top_k=2)
    folder = tmp_path_factory.mktemp("tiny")
    recorded.save(folder / ROUTING_NAME)
    spec = replace(spec_of(recorded, BELADY, slots=slots), warm_from=2)
    found = total(run_arm(spec, str(folder), None), "misses")
    schedule = Schedule(recorded, prompt_tokens=planted.PROMPT)
    uses = [
        [4 * key.layer_idx + key.expert_idx for key in layer]
        for sequence in range(2)
        for one in schedule.passes(sequence)
        for layer in one
    ]
    assert found == belady_misses(uses, slots)


@given(seed=st.integers(0, 10**6), slots=st.integers(3, 36))
@settings(max_examples=20, deadline=None)
def test_lru_counts_what_a_plain_lru_counts(seed, slots):
    """A layer's hits are used, then its misses admitted, each the most recent."""
    recorded = planted.routing(seed=seed)
    rows = np.concatenate(
        [np.arange(a + planted.PROMPT, b) for a, b in
         zip(recorded.offsets, recorded.offsets[1:], strict=False)]
    )  # fmt: skip
    _, counted = table(recorded, arm_of("lru", slots=slots, recorded=recorded))
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    misses = 0
    for token in np.sort(recorded.topk_ids[rows], axis=2).tolist():
        for layer_idx, chosen in enumerate(token):
            absent = [expert for expert in chosen if (layer_idx, expert) not in held]
            for expert in chosen:
                if expert not in absent:
                    held.move_to_end((layer_idx, expert))
            for expert in absent:
                misses += 1
                if len(held) >= slots:
                    held.popitem(last=False)
                held[layer_idx, expert] = None
    assert total(counted, "misses") == misses


@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(1, 36),
    policy=st.sampled_from(ONLINE),
    has_prompts=st.booleans(),
    link=st.sampled_from([1.01e6, 4.3e6, 2.9e7]),
)
@example(seed=124, slots=5, policy="lfu", has_prompts=True, link=1.01e6)
@settings(max_examples=30, deadline=None)
def test_short_way_equals_the_executors_way(seed, slots, policy, has_prompts, link):
    """Demand-only replay counts what Acquisition counts on a link that is waited for."""
    recorded = planted.routing(seed=seed)
    told = planted.foretold(recorded, noise=0.3, seed=seed) if policy == "forecast" else None
    # No two sums of these times are the same, so what arrives first is the same either way.
    times = replace(planted.TIMES, miss_s=2.13e-4, fetch_s=3.07e-4, wave_s=0.71e-4,
                    wake_s=1.17e-4, wake_share=0.053)  # fmt: skip
    carriage = replace(planted.CARRIAGE, link_bytes_per_s=link, latency_s=1.9e-4)
    arm = arm_of(policy, slots=slots, recorded=recorded, told=told, times=times, carriage=carriage)
    _, short = table(recorded, arm, has_prompts=has_prompts)

    class Long(Replay):
        def _on_demand(self, layers, **given):
            return self._reading_ahead(layers, **given)

    schedule = Schedule(recorded, prompt_tokens=planted.PROMPT, has_prompts=has_prompts)
    long = Long(schedule, arm).run(range(schedule.num_sequences))
    if slots >= recorded.shape.top_k:
        np.testing.assert_allclose(short, long, rtol=1e-9, atol=1e-12)
    else:
        assert total(short, "lookups") == total(long, "lookups")


@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(4, 30),
    noise=st.sampled_from([0.0, 0.3, 1.0]),
    prefetch=st.sampled_from(["off", "on", "auto"]),
    speed=st.sampled_from([1e5, 1e6, 1e8]),
    has_prompts=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_bytes_and_times_reconcile_with_hits_and_misses(
    seed, slots, noise, prefetch, speed, has_prompts
):
    recorded = planted.routing(seed=seed)
    carriage = replace(planted.CARRIAGE, link_bytes_per_s=speed)
    told = planted.foretold(recorded, noise=noise, seed=seed)
    # Forecasts go on beyond the last token, as those of real predictors do.
    told = replace(told, is_known=np.ones_like(told.is_known))
    arm = arm_of("layer-lfu", slots=slots, recorded=recorded, prefetch=prefetch, told=told,
                 carriage=carriage)  # fmt: skip
    replay, rows = table(recorded, arm, has_prompts=has_prompts)
    size = carriage.expert_bytes
    shape, times = recorded.shape, planted.TIMES
    tokens = total(rows, "tokens")
    assert tokens == recorded.num_tokens - planted.PROMPT * 6
    assert total(rows, "lookups") == tokens * shape.num_moe_layers * shape.top_k
    served = ("hits_resident", "hits_prefetched", "late_hits", "misses")
    assert total(rows, "lookups") == sum(total(rows, name) for name in served)
    # A miss is read on demand unless a prefetch for a later step brought it meanwhile.
    assert total(rows, "bytes_on_demand") <= size * total(rows, "misses")
    moved = total(rows, "prefetch_issued") - total(rows, "prefetch_cancelled")
    assert total(rows, "bytes_prefetched") == size * moved
    if not has_prompts:
        in_flight = sum(not one.is_done for one in replay._prefetcher._in_flight.values())
        copied = size * (sum(replay.link.copied.values()) + in_flight)
        read = total(rows, "bytes_on_demand") + total(rows, "bytes_prefetched")
        # Without prefetching, copies are only timed.
        assert copied == (read if prefetch != "off" else 0)
    if prefetch == "off":
        assert moved == 0 and total(rows, "bytes_on_demand") == size * total(rows, "misses")
        assert total(rows, "late_hits") == total(rows, "hits_prefetched") == 0
    busy = tokens * (times.begin_s + times.end_s + shape.num_moe_layers * times.layer_s)
    busy += total(rows, "lookups") * times.expert_s
    assert total(rows, "seconds") == pytest.approx(busy + total(rows, "stall_s"))
    if prefetch == "off" and speed == 1e5:
        # Nothing can be hidden behind less than what is computed meanwhile.
        send_s = replay.link.send_s
        floor = total(rows, "misses") * send_s - total(rows, "lookups") * times.expert_s
        assert total(rows, "stall_s") >= floor - 1e-9


@pytest.mark.parametrize("prefetch", ["off", "on", "auto"])
def test_two_runs_are_identical(prefetch):
    recorded = planted.routing(seed=3)
    told = planted.foretold(recorded, noise=0.3)
    arm = arm_of("forecast", slots=12, recorded=recorded, told=told, prefetch=prefetch)
    np.testing.assert_array_equal(table(recorded, arm)[1], table(recorded, arm)[1])


@given(seed=st.integers(0, 10**6), slots=st.integers(9, 30))
@settings(max_examples=20, deadline=None)
def test_oracle_is_at_least_every_predictor(seed, slots):
    """Reading ahead by the truth waits no longer and hits no less than by any guess."""
    recorded = planted.routing(seed=seed)
    outcomes = {}
    for noise in (0.0, 0.3, 0.7, 1.0):
        told = planted.foretold(recorded, noise=noise, seed=seed)
        arm = arm_of("layer-lfu", slots=slots, recorded=recorded, told=told, prefetch="on")
        _, rows = table(recorded, arm)
        hits = total(rows, "hits_resident") + total(rows, "hits_prefetched")
        outcomes[noise] = hits, total(rows, "stall_s")
    for noise, (hits, stall_s) in outcomes.items():
        assert outcomes[0.0][0] >= hits and outcomes[0.0][1] <= stall_s + 1e-9, noise


def test_oracle_on_a_fast_link_hides_all_reads_that_fit():
    recorded = planted.routing(seed=1)
    carriage = replace(planted.CARRIAGE, link_bytes_per_s=1e9, latency_s=0.0)
    arm = arm_of("layer-lfu", slots=24, recorded=recorded, prefetch="on", carriage=carriage,
                 told=planted.foretold(recorded, noise=0.0))  # fmt: skip
    _, rows = table(recorded, arm)
    assert total(rows, "misses") < 0.03 * total(rows, "lookups")


def test_hand_computed_stall():
    """Two layers, 3 experts each, nothing resident: reads overlap only what has arrived."""
    recorded = planted.routing(seed=0, sequences=1, length=3, layers=2)
    arm = arm_of("lru", slots=36, recorded=recorded)
    _, rows = table(recorded, arm)
    # Copies of 1 ms and 0.1 ms of latency arrive at 1.1, 2.1, 3.1 ms; 0.1 ms of arithmetic hides
    # behind the next one: waits 1.1 + 0.9 + 0.9 a layer.
    assert total(rows, "stall_s") == pytest.approx(2 * 2.9e-3)
    assert total(rows, "seconds") == pytest.approx(1e-4 + 2 * (5e-4 + 2.9e-3 + 3e-4) + 1e-4)


def test_hand_computed_waves():
    """What arrives while others are computed is one wave; a wait and a call have their price."""
    recorded = planted.routing(seed=0, sequences=1, length=3, layers=2)
    times = replace(planted.TIMES, wave_s=2e-4, wake_s=3e-4, wake_share=0.5)
    carriage = replace(planted.CARRIAGE, link_bytes_per_s=4e6)
    arm = arm_of("lru", slots=36, recorded=recorded, times=times, carriage=carriage)
    _, rows = table(recorded, arm)
    # Copies of 0.25 ms arrive at 0.35, 0.6 and 0.85 ms. The first is waited for; waking (0.3 and
    # half of 0.35), the call and an expert last till 1.125 ms, when both others are there.
    assert total(rows, "stall_s") == pytest.approx(2 * 0.35e-3)
    layer_s = 0.35e-3 + (0.3e-3 + 0.175e-3 + 0.2e-3 + 0.1e-3) + (0.2e-3 + 2 * 0.1e-3)
    assert total(rows, "seconds") == pytest.approx(1e-4 + 2 * (5e-4 + layer_s) + 1e-4)


@pytest.mark.parametrize(
    "policy", ["lru", "lfu", "layer-lru", "layer-lfu", "layer-ucp", "static", "belady"]
)
def test_cost_grows_linearly_in_tokens(policy, tmp_path):
    def calls(sequences: int) -> int:
        recorded = planted.routing(seed=5, sequences=sequences, length=40)
        folder = tmp_path / str(sequences)
        folder.mkdir()
        recorded.save(folder / ROUTING_NAME)
        count = 0

        def tally(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(tally)
        try:
            run_arm(spec_of(recorded, policy, slots=12), str(folder), None)
        finally:
            sys.setprofile(None)
        return count

    calls(2)
    small, large = calls(10), calls(40)
    assert large < 4.6 * small


def test_tiled_layers_repeat_the_recorded_ones():
    recorded = planted.routing(seed=2, layers=3)
    tiled = tile_routing(recorded, 7)
    assert tiled.shape.num_moe_layers == 7 and tiled.topk_ids.shape[1] == 7
    layers = [0, 0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(tiled.topk_ids, recorded.topk_ids[:, layers])
    told = planted.foretold(recorded, noise=0.2)
    said = tile_foretold(told, 7)
    assert told.before is not None and said.before is not None
    np.testing.assert_array_equal(said.before, told.before[:, :, layers])


def test_tiled_in_pass_forecasts_are_said_in_the_last_copy():
    recorded = planted.routing(seed=2, layers=3)
    told = replace(
        planted.foretold(recorded, noise=0.0),
        before=None,
        layers={0: np.arange(2, dtype=np.float16)[None, :, None] + np.zeros((120, 2, 12))},
    )
    said = tile_foretold(told, 6)
    assert list(said.layers) == [1]
    np.testing.assert_array_equal(said.layers[1][0, :, 0], [0, 0, 1, 1])


@pytest.mark.parametrize("prefetch", ["off", "on"])
def test_timeline_of_a_token_adds_up(prefetch, tmp_path):
    recorded = planted.routing(seed=4)
    told = planted.foretold(recorded, noise=0.2)
    arm = arm_of("layer-lfu", slots=12, recorded=recorded, told=told, prefetch=prefetch)
    schedule = Schedule(recorded, prompt_tokens=planted.PROMPT)
    line = timeline(schedule, arm, name="one")
    shape, times = recorded.shape, planted.TIMES
    work = [one for one in line["events"] if one["lane"] == "processor"]
    busy = times.begin_s + times.end_s + shape.num_moe_layers * times.layer_s
    busy += shape.num_moe_layers * shape.top_k * times.expert_s
    assert sum(one["seconds"] for one in work) == pytest.approx(busy)
    assert line["seconds"] >= busy - 1e-12 and line["simulated"] is True
    # Neither lane does two things at a time, but for copies that were overtaken.
    for one, following in pairwise(work):
        assert one["start_s"] + one["seconds"] <= following["start_s"] + 1e-12
    copies = [one for one in line["events"] if one["lane"] == "link"]
    assert copies and all(0 < one["seconds"] <= line["seconds"] + 1e-12 for one in copies)
    if prefetch == "off":
        copy_s = planted.CARRIAGE.latency_s + 1000 / 1e6
        assert all(one["seconds"] == pytest.approx(copy_s) for one in copies)
    trace = json.loads(write_trace([line], tmp_path).read_text())
    spans = [one for one in trace["traceEvents"] if one["ph"] == "X"]
    assert len(spans) == len(line["events"])

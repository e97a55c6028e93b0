"""Prefetcher: what it issues, in which order, what it leaves alone, and how it gives up."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.predictors.base import Forecast
from outrider.runtime.errors import TransferError, UsageError
from outrider.runtime.experts.cache import ExpertCache, Kind, SlotState
from outrider.runtime.experts.controller import ASKED_STEPS, FIRST_STEPS
from outrider.runtime.experts.eviction import LruEviction
from outrider.runtime.experts.prefetcher import MAX_FAILURES, Prefetcher
from outrider.runtime.testing import ManualTransfer, VirtualClock

SHAPE = ModelShape(
    num_moe_layers=4, num_experts=8, top_k=2, hidden_size=8, expert_size=8, fingerprint=""
)
NBYTES = 1000


class Bench:
    """A prefetcher on a cache and an engine that only do bookkeeping, and a clock."""

    def __init__(
        self, num_slots: int = 16, *, mode: str = "on", limit: int = 8, bandwidth: float = 0.0
    ) -> None:
        self.clock = VirtualClock()
        self.engine = ManualTransfer(nbytes=NBYTES, bandwidth=bandwidth, clock=self.clock)
        self.cache = ExpertCache(
            num_slots, eviction=LruEviction(SHAPE, num_slots), prefetch_limit=limit
        )
        self.prefetcher = Prefetcher(
            self.cache,
            self.engine,
            shape=SHAPE,
            nbytes=NBYTES,
            mode=mode,  # type: ignore[arg-type]
            clock=self.clock,
        )

    def queued(self) -> list[ExpertKey]:
        return [copy.key for copy in self.engine.pending]

    def load(self, *keys: ExpertKey) -> None:
        for key in keys:
            slot = self.cache.reserve(key, Kind.ON_DEMAND)
            assert slot is not None
            self.cache.commit(slot)


def forecast(
    step: int, probabilities: dict[ExpertKey, float], layers: tuple[int, int] = (0, 4)
) -> Forecast:
    table = np.zeros((layers[1] - layers[0], SHAPE.num_experts), np.float32)
    for key, probability in probabilities.items():
        table[key.layer_idx - layers[0], key.expert_idx] = probability
    return Forecast(step, *layers, table)


def key(layer_idx: int, expert_idx: int) -> ExpertKey:
    return ExpertKey(layer_idx, expert_idx)


def asked_at(bench: Bench, step: int, reach: int, *, free: set[int] = frozenset()) -> list[int]:
    """The layers of a step at which a predictor that speaks `reach` layers ahead is asked."""
    asked = []
    for layer_idx in range(SHAPE.num_moe_layers):
        if bench.prefetcher.is_due(step, layer_idx, is_free=layer_idx in free):
            asked.append(layer_idx)
            end = min(layer_idx + 1 + reach, SHAPE.num_moe_layers)
            bench.prefetcher.offer(forecast(step, {}, (layer_idx + 1, end)))
        bench.prefetcher.advance(step, layer_idx)
    return asked


def test_a_predictor_is_asked_in_the_pass_where_it_says_something_new_or_costs_nothing() -> None:
    bench = Bench()
    assert asked_at(bench, 1, 1) == [0, 1, 2], (
        "each speaks of the next layer only, the last of none"
    )
    assert asked_at(bench, 2, 4) == [0]
    bench.prefetcher.offer(forecast(3, {}))
    assert asked_at(bench, 3, 4) == [2], "what was said before the token is three layers old"
    bench.prefetcher.offer(forecast(4, {}))
    assert asked_at(bench, 4, 4, free={0, 1, 3}) == [0, 1], "of the last layer nothing follows"
    bench.prefetcher.begin()
    assert asked_at(bench, 4, 4) == [0], "a new sequence knows nothing of the one before"


def test_likely_absent_experts_are_issued_likeliest_and_soonest_first() -> None:
    bench = Bench()
    bench.load(key(1, 0))
    bench.prefetcher.offer(
        forecast(
            1,
            {
                key(3, 1): 0.9,
                key(1, 0): 0.99,
                key(2, 2): 0.5,
                key(2, 3): 0.9,
                key(1, 4): 0.5,
                key(3, 5): 0.29,
            },
        )
    )
    bench.prefetcher.advance(1, 0)
    assert bench.queued() == [key(2, 3), key(3, 1), key(1, 4), key(2, 2)]
    assert all(copy.kind is Kind.PREFETCH for copy in bench.engine.pending)
    assert bench.cache.counters.prefetch_issued == 4


def test_layers_that_have_passed_are_not_prefetched() -> None:
    bench = Bench()
    bench.prefetcher.offer(forecast(3, {key(index, 0): 0.9 for index in range(4)}))
    bench.prefetcher.advance(3, 2)
    assert bench.queued() == [key(3, 0)]
    bench.prefetcher.offer(forecast(2, {key(3, 7): 0.9}))
    assert key(3, 7) not in bench.prefetcher.wanted
    bench.prefetcher.advance(3, 2)
    assert bench.queued() == [key(3, 0)]


def test_finished_prefetches_become_ready_and_failed_ones_free_their_slot() -> None:
    bench = Bench()
    bench.prefetcher.offer(forecast(1, {key(1, 0): 0.9, key(2, 0): 0.9}))
    bench.prefetcher.advance(1, 0)
    good, bad = bench.engine.pending
    bench.engine.complete(good)
    bench.engine.fail(bad)
    assert bench.cache.state(good.key) is SlotState.LOADING
    bench.prefetcher.settle()
    assert bench.cache.lookup(good.key) == good.slot
    assert bench.cache.state(bad.key) is None
    assert bench.cache.record_use(good.key), "its first use counts as a prefetched hit"
    bench.cache.check()


def test_a_newer_forecast_cancels_what_it_no_longer_wants() -> None:
    bench = Bench()
    bench.prefetcher.offer(forecast(1, {key(1, 0): 0.9, key(2, 0): 0.8, key(3, 0): 0.7}))
    bench.prefetcher.advance(1, 0)
    started = bench.engine.pending[1]
    bench.engine.start(started)
    bench.prefetcher.offer(forecast(1, {key(1, 5): 0.9}, layers=(1, 3)))
    bench.prefetcher.advance(1, 0)
    # (1, 0) was queued and is stale; (2, 0) is being copied; (3, 0) was not spoken of.
    assert bench.queued() == [key(2, 0), key(3, 0), key(1, 5)]
    assert bench.cache.state(key(1, 0)) is None
    assert bench.cache.counters.prefetch_cancelled == 1
    bench.cache.check()


def test_a_prefetch_whose_layer_has_passed_is_cancelled() -> None:
    bench = Bench()
    bench.prefetcher.offer(forecast(1, {key(1, 0): 0.9, key(2, 0): 0.9}))
    bench.prefetcher.advance(1, 0)
    bench.prefetcher.advance(1, 1)
    assert bench.queued() == [key(2, 0)]


def test_a_late_hit_is_handed_over_ahead_of_all_prefetches() -> None:
    bench = Bench(limit=2)
    bench.prefetcher.offer(forecast(1, {key(1, 0): 0.9, key(1, 1): 0.8, key(2, 2): 0.7}))
    bench.prefetcher.advance(1, 0)
    assert bench.queued() == [key(1, 0), key(1, 1)]
    transfer = bench.prefetcher.claim(key(1, 1))
    assert transfer is not None and transfer.key == key(1, 1)
    assert bench.prefetcher.claim(key(1, 1)) is None
    assert bench.queued() == [key(1, 1), key(1, 0)]
    bench.prefetcher.advance(1, 0)
    assert bench.queued() == [key(1, 1), key(1, 0), key(2, 2)], "its place is free again"
    transfer.wait()
    bench.cache.commit(transfer.slot)
    bench.cache.check()


def test_forecast_experts_are_not_evicted_for_less_likely_ones() -> None:
    bench = Bench(num_slots=2, limit=2)
    bench.load(key(1, 0), key(1, 1))
    bench.prefetcher.offer(forecast(1, {key(1, 0): 0.9, key(1, 1): 0.9, key(1, 2): 0.5}))
    assert set(bench.prefetcher.wanted) == {key(1, 0), key(1, 1), key(1, 2)}
    bench.prefetcher.advance(1, 0)
    assert bench.queued() == []
    assert set(bench.cache.resident()) == {key(1, 0), key(1, 1)}


def test_pinned_experts_stay_and_the_limit_holds() -> None:
    bench = Bench(num_slots=4, limit=3)
    bench.load(key(0, 0), key(0, 1), key(0, 2), key(0, 3))
    with bench.cache.pin([key(0, 0), key(0, 1), key(0, 2)]):
        bench.prefetcher.offer(forecast(1, {key(1, index): 0.9 for index in range(8)}))
        bench.prefetcher.advance(1, 0)
        assert len(bench.queued()) == 1
    bench.prefetcher.advance(1, 0)
    assert len(bench.queued()) == 3
    bench.cache.check()


def test_what_cannot_arrive_in_time_is_not_issued() -> None:
    bench = Bench(bandwidth=NBYTES / 1.0, limit=16)
    for layer_idx in range(4):
        bench.prefetcher.advance(0, layer_idx)
        bench.clock.advance(0.4)
    bench.prefetcher.offer(forecast(1, {key(1, 0): 0.9, key(2, 0): 0.9, key(3, 0): 0.9}))
    bench.prefetcher.advance(1, 0)
    # A layer takes 0.4 s and a copy 1 s: half a copy fits before layer 2 and not before layer 1.
    assert bench.queued() == [key(2, 0)]


def test_the_budget_of_a_step_is_the_link_time_that_misses_leave() -> None:
    def num_issued(on_demand_bytes: int) -> int:
        bench = Bench(bandwidth=10.0 * NBYTES, limit=16)
        for step in range(30):
            for layer_idx in range(4):
                bench.prefetcher.advance(step, layer_idx)
                bench.clock.advance(0.25)
            bench.prefetcher.end_step(stall_s=0.0, on_demand_bytes=on_demand_bytes)
        wanted = {key(layer_idx, index): 0.9 for layer_idx in (2, 3) for index in range(8)}
        bench.prefetcher.offer(forecast(30, wanted))
        bench.prefetcher.advance(30, 0)
        first = len(bench.queued())
        bench.engine.complete_all()
        bench.prefetcher.advance(30, 0)
        second = len(bench.queued())
        bench.prefetcher.end_step(stall_s=0.0, on_demand_bytes=on_demand_bytes)
        bench.engine.complete_all()
        bench.prefetcher.advance(30, 0)
        assert bench.queued(), "the next step has a budget of its own"
        return first + second

    # One step takes 1 s, in which the link carries 10 experts; deadlines allow for 5 to 7.
    assert num_issued(0) == 10
    assert num_issued(7 * NBYTES) == 3
    assert num_issued(50 * NBYTES) == 1, "one stays possible, to learn from"


def test_off_issues_nothing_and_wants_nothing() -> None:
    bench = Bench(mode="off")
    bench.prefetcher.offer(forecast(1, {key(1, 0): 1.0}))
    bench.prefetcher.advance(1, 0)
    assert bench.queued() == [] and not bench.prefetcher.wanted and bench.prefetcher.reach == 0


def test_an_unknown_mode_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'sometimes'.*on, off, auto"):
        Bench(mode="sometimes")


def test_what_the_next_tokens_forecast_read_ahead_is_told_apart_once() -> None:
    bench = Bench()
    bench.prefetcher.offer(forecast(1, {key(3, 0): 0.9}))
    bench.prefetcher.offer(forecast(2, {key(0, 1): 0.9}))
    bench.prefetcher.advance(1, 2)
    assert sorted(bench.queued()) == [key(0, 1), key(3, 0)]
    assert not bench.prefetcher.was_for_next(key(3, 0))
    assert bench.prefetcher.was_for_next(key(0, 1))
    assert not bench.prefetcher.was_for_next(key(0, 1))


def test_a_warm_start_fills_free_slots_and_gives_way_to_the_first_pass() -> None:
    bench = Bench(num_slots=4, mode="off", limit=1)
    bench.load(key(3, 7))
    bench.prefetcher.warm([key(0, 0), key(3, 7), key(0, 1), key(1, 1), key(2, 2)])
    assert bench.queued() == [key(0, 0), key(0, 1), key(1, 1)], "as many as there are slots"
    arrived, begun, _ = bench.engine.pending
    bench.engine.complete(arrived)
    bench.engine.start(begun)
    bench.prefetcher.advance(0, -1)
    assert bench.cache.state(key(0, 0)) is SlotState.READY
    assert bench.queued() == [key(0, 1)], "what was not begun is cancelled"
    assert bench.prefetcher.claim(key(0, 1)) is begun, "what was begun is waited for if needed"
    bench.engine.complete(begun)
    bench.cache.commit(begun.slot)
    assert not bench.cache.record_use(key(0, 0)), "resident, and not a prefetch"
    assert bench.cache.counters.prefetch_issued == 0
    bench.cache.check()


def test_repeated_failures_turn_prefetching_off(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    for step in range(1, MAX_FAILURES + 3):
        bench.prefetcher.offer(forecast(step, {key(1, step % 8): 0.9}))
        bench.prefetcher.advance(step, 0)
        for copy in bench.engine.pending:
            bench.engine.fail(copy)
    assert bench.cache.counters.prefetch_issued == MAX_FAILURES
    assert bench.prefetcher.reach == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert bench.cache.num_free == bench.cache.num_slots


def test_a_closed_engine_is_no_error_for_the_prefetcher() -> None:
    bench = Bench()
    bench.engine.close()
    bench.prefetcher.offer(forecast(1, {key(1, 0): 0.9}))
    bench.prefetcher.advance(1, 0)
    assert bench.cache.num_free == bench.cache.num_slots


def test_a_new_sequence_forgets_the_forecasts_of_the_last() -> None:
    bench = Bench()
    bench.prefetcher.offer(forecast(9, {key(1, 0): 0.9}))
    bench.prefetcher.advance(9, 0)
    bench.prefetcher.begin()
    assert bench.queued() == [] and not bench.prefetcher.wanted
    bench.prefetcher.offer(forecast(1, {key(1, 1): 0.9}))
    bench.prefetcher.advance(0, 3)
    assert bench.queued() == [key(1, 1)]


def test_closing_leaves_no_slot_behind() -> None:
    bench = Bench()
    bench.prefetcher.offer(forecast(1, {key(1, 0): 0.9, key(2, 0): 0.9, key(3, 0): 0.9}))
    bench.prefetcher.advance(1, 0)
    bench.engine.start(bench.engine.pending[0])
    bench.prefetcher.close()
    bench.prefetcher.close()
    assert bench.queued() == []
    assert bench.cache.num_loading == 0 and set(bench.cache.resident()) == {key(1, 0)}
    bench.cache.check()


PROBABILITY = st.sampled_from([0.0, 0.2, 0.3, 0.5, 0.9, 1.0])
ACTION = st.one_of(
    st.tuples(
        st.just("offer"),
        st.integers(0, 1),
        st.integers(0, 3),
        st.lists(st.lists(PROBABILITY, min_size=8, max_size=8), min_size=1, max_size=4),
    ),
    st.tuples(st.sampled_from(["advance", "complete", "fail", "start"]), st.integers(0, 20)),
    st.tuples(st.just("need"), st.integers(0, 7)),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.integers(0, 4), st.sampled_from([0.0, 3000.0]), st.lists(ACTION))
def test_any_course_of_events_keeps_the_books_straight(
    num_slots: int, limit: int, bandwidth: float, actions: list[tuple]
) -> None:
    bench = Bench(num_slots, limit=limit, bandwidth=bandwidth)
    position = 0
    for name, *values in actions:
        step, layer_idx = divmod(position, SHAPE.num_moe_layers)
        if name == "offer":
            ahead, layer_from, rows = values
            rows = np.array(rows, np.float32)[: SHAPE.num_moe_layers - layer_from]
            bench.prefetcher.offer(Forecast(step + ahead, layer_from, layer_from + len(rows), rows))
        elif name == "advance":
            position += 1
            bench.clock.advance(0.1)
            bench.prefetcher.advance(*divmod(position, SHAPE.num_moe_layers))
        elif name == "need":
            needed = key(layer_idx, values[0])
            bench.prefetcher.settle()
            if bench.cache.lookup(needed) is None:
                transfer = bench.prefetcher.claim(needed)
                if transfer is None:
                    slot = bench.cache.reserve(needed, Kind.ON_DEMAND, keep=bench.prefetcher.wanted)
                    if slot is None:
                        assert bench.cache.num_loading == num_slots
                        continue
                    transfer = bench.engine.submit(needed, slot, Kind.ON_DEMAND)
                try:
                    transfer.wait()
                except TransferError:
                    bench.cache.abandon(transfer.slot)
                    continue
                bench.cache.commit(transfer.slot)
            with bench.cache.pin([needed]):
                bench.prefetcher.advance(step, layer_idx)
                assert bench.cache.lookup(needed) is not None
            bench.cache.record_use(needed)
        elif bench.engine.pending:
            copy = bench.engine.pending[values[0] % len(bench.engine.pending)]
            getattr(bench.engine, name)(copy)
        bench.cache.check()
        assert len(bench.engine.pending) <= bench.cache.num_loading
    bench.prefetcher.close()
    bench.cache.check()
    assert bench.cache.num_loading == 0


def test_decisions_need_no_tensors() -> None:
    program = (
        "import sys\n"
        "import outrider.runtime.experts.cache, outrider.runtime.experts.eviction\n"
        "import outrider.runtime.experts.prefetcher, outrider.predictors.frequent\n"
        "loaded = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'{loaded} were imported' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_while_nothing_may_be_read_ahead_the_price_of_a_read_stays() -> None:
    """Else it falls in each rest, and the next trial begins with reads that are mostly in vain."""
    bench = Bench(mode="auto")
    least = bench.prefetcher._price.least_probability
    for _ in range(200):
        if not bench.prefetcher.reach:
            bench.prefetcher.end_step(stall_s=0.0, on_demand_bytes=NBYTES, wall_s=1.0)
    assert bench.prefetcher._price.least_probability == least


def test_an_estimate_counts_the_missing_experts_that_forecasts_spoke_of() -> None:
    bench = Bench(mode="auto")
    for _ in range(FIRST_STEPS):
        bench.prefetcher.begin_step(is_decode=True)
        assert not bench.prefetcher.wants_forecasts
        bench.prefetcher.end_step(stall_s=0.5, on_demand_bytes=NBYTES, wall_s=1.0)
    heard: list[tuple[int, int]] = []
    controller = bench.prefetcher._controller
    assert controller is not None
    learn = controller.end_step

    def listen(**measured: float) -> None:
        heard.append((int(measured["num_absent"]), int(measured["num_foreseen"])))
        learn(**measured)

    controller.end_step = listen  # type: ignore[method-assign]
    for step in range(5, 5 + ASKED_STEPS):
        assert bench.prefetcher.wants_forecasts and not bench.prefetcher.reach
        bench.prefetcher.offer(forecast(step, {key(1, 0): 0.9, key(2, 0): 0.9, key(2, 1): 0.1}))
        bench.prefetcher.advance(step, 0)
        assert not bench.queued(), "asked, and nothing read"
        bench.prefetcher.missed(key(1, 0))
        bench.prefetcher.missed(key(1, 3))
        bench.prefetcher.advance(step, 1)
        bench.prefetcher.missed(key(2, 1))
        bench.prefetcher.end_step(stall_s=0.5, on_demand_bytes=3 * NBYTES, wall_s=1.0)
    assert heard == [(3, 1)] * ASKED_STEPS

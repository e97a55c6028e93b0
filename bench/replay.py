"""Recorded routing through the engine's own cache, eviction and prefetcher, on a virtual clock.

One arm at a time, one sequence after the other. No model is computed: its times are given, and its
forecasts were made before.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np

from ..collect.schema import ExpertKey
from ..runtime.acquisition import Acquisition
from ..runtime.experts.cache import CacheCounters, ExpertCache, Kind
from ..runtime.experts.eviction import EvictionPolicy
from ..runtime.experts.prefetcher import Mode, Prefetcher
from ..runtime.stats import ExpertTraffic
from ..runtime.testing import VirtualClock
from .foretold import Foretold
from .link import VirtualLink
from .routing import Routing

COUNTS = (*(item.name for item in fields(ExpertTraffic)), "tokens", "stall_s", "seconds")
"""Columns of a replay's table, of decode steps only; `seconds` and `stall_s` are the model's."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one decode step apart from waiting: before the first layer, per MoE layer before
    its router, per expert computed, after the last layer. A prompt takes them once, too.

    Nothing where it is not known: of the processor's own work on reads, per layer that lacks an
    expert, per expert asked for, per layer in which forecasts are made, per prefetch issued; per
    layer that a predictor is shown, asked or not; per wave, which is one call of the experts'
    kernel; and what a wait leaves behind (a processor that has slept goes on with cold caches), per
    wait and per second waited.
    """

    begin_s: float
    layer_s: float
    expert_s: float
    end_s: float
    fetch_s: float = 0.0
    miss_s: float = 0.0
    forecast_s: float = 0.0
    issue_s: float = 0.0
    follow_s: float = 0.0
    wave_s: float = 0.0
    wake_s: float = 0.0
    wake_share: float = 0.0

    def wave(self, num_experts: int, *, waited_s: float) -> float:
        """What computing that many experts at once takes, after a wait of so long."""
        woken_s = self.wake_s + self.wake_share * waited_s if waited_s > 0.0 else 0.0
        return woken_s + self.wave_s + self.expert_s * num_experts


@dataclass(frozen=True, slots=True)
class Carriage:
    """What an expert costs to bring: its bytes, and the link it comes over."""

    expert_bytes: int
    link_bytes_per_s: float
    latency_s: float = 0.0


class Schedule:
    """Which experts each pass of each sequence needs, as the engine's look-ups have them.

    A sequence is a prompt of `prompt_tokens` rows in one pass (step 0), then a pass a token.
    Prompts are shown to predictors; unless `has_prompts`, they pass the cache by (step 0 needs
    nothing), so that what is counted is all there is and Belady's bound is one.
    """

    def __init__(self, routing: Routing, *, prompt_tokens: int, has_prompts: bool = False) -> None:
        shape = routing.shape
        self.shape = shape
        self.prompt_tokens = prompt_tokens
        self.has_prompts = has_prompts
        self.num_sequences = len(routing.offsets) - 1
        self._routing = routing
        self._keys = [
            [ExpertKey(layer_idx, expert_idx) for expert_idx in range(shape.num_experts)]
            for layer_idx in range(shape.num_moe_layers)
        ]

    def passes(self, sequence: int) -> list[list[list[ExpertKey]]]:
        """Per pass and layer the distinct experts, ascending; made anew at each call."""
        start, end = (int(row) for row in self._routing.offsets[sequence : sequence + 2])
        first = start + self.prompt_tokens
        prompt = self._routing.topk_ids[start : first if self.has_prompts else start]
        decoded = np.sort(self._routing.topk_ids[first:end], axis=2).tolist()
        keys = self._keys
        return [
            [
                [keys[layer_idx][one] for one in np.unique(prompt[:, layer_idx]).tolist()]
                for layer_idx in range(self.shape.num_moe_layers)
            ],
            *(
                [[row[one] for one in ids] for row, ids in zip(keys, token, strict=True)]
                for token in decoded
            ),
        ]

    def uses(self, sequences: Sequence[int]) -> list[ExpertKey]:
        """Every look-up of these sequences, in order."""
        return [
            key
            for sequence in sequences
            for one in self.passes(sequence)
            for layer in one
            for key in layer
        ]


@dataclass(frozen=True, slots=True)
class Arm:
    """What one replay runs: slots, policy, forecasts (None: none are made), and how to prefetch."""

    num_slots: int
    eviction: Callable[[], EvictionPolicy]
    foretold: Foretold | None
    prefetch: Mode
    carriage: Carriage
    times: StepTimes


class Replay:
    """A cache and what fills it, kept over all sequences that `run` is given."""

    def __init__(self, schedule: Schedule, arm: Arm) -> None:
        self.schedule = schedule
        self._arm = arm
        self._clock = VirtualClock()
        self.link = VirtualLink(
            self._clock,
            nbytes=arm.carriage.expert_bytes,
            bytes_per_s=arm.carriage.link_bytes_per_s,
            latency_s=arm.carriage.latency_s,
        )
        self.cache = ExpertCache(arm.num_slots, eviction=arm.eviction())
        self._prefetcher = Prefetcher(
            self.cache,
            self.link,
            shape=schedule.shape,
            nbytes=arm.carriage.expert_bytes,
            mode=arm.prefetch,
            clock=self._clock,
        )
        self._num_passes = 0

    def preload(self, keys: Sequence[ExpertKey]) -> None:
        """Let these experts be resident from the start, at no cost; at most one a slot."""
        for key in keys[: self._arm.num_slots]:
            slot = self.cache.reserve(key, Kind.ON_DEMAND)
            assert slot is not None
            self.cache.commit(slot)

    def run(self, sequences: Sequence[int]) -> np.ndarray:
        """Replay these sequences: a table [S, len(COUNTS)] of their decode steps."""
        return np.array([self._sequence(sequence) for sequence in sequences])

    def _sequence(self, sequence: int) -> list[float]:
        self._prefetcher.begin()
        total = ExpertTraffic()
        stall_s = seconds = 0.0
        passes = self.schedule.passes(sequence)
        for step, layers in enumerate(passes):
            if not (step or self.schedule.has_prompts):
                continue
            began, before = self._clock.now, astuple(self.cache.counters)
            # The prompt's look-ups are served and not counted.
            traffic = total if step else ExpertTraffic()
            on_demand = traffic.bytes_on_demand
            # Which of a layer's own experts can make room for the rest of them, only Acquisition
            # knows.
            is_short = self._arm.prefetch == "off" and max(map(len, layers)) <= self._arm.num_slots
            serve = self._on_demand if is_short else self._reading_ahead
            stall = serve(layers, sequence=sequence, step=step, traffic=traffic)
            if not step:
                continue
            elapsed = self._clock.now - began
            self._prefetcher.end_step(
                stall_s=stall,
                on_demand_bytes=traffic.bytes_on_demand - on_demand,
                wall_s=elapsed,
            )
            stall_s += stall
            seconds += elapsed
            _count_prefetches(traffic, before, self.cache.counters)
        before = astuple(self.cache.counters)
        # What is still queued for tokens that never come is cancelled here, and counted.
        self._prefetcher.begin()
        _count_prefetches(total, before, self.cache.counters)
        started = total.prefetch_issued - total.prefetch_cancelled
        total.bytes_prefetched = started * self._arm.carriage.expert_bytes
        total.check()
        return [*astuple(total), len(passes) - 1, stall_s, seconds]

    def _spend(self, what: str, seconds: float) -> None:
        """The processor works for so long."""
        self._clock.now += seconds

    def _read_ahead(self, step: int, layer_idx: int) -> None:
        """Issue what is worth it now. Copies begin when that is done."""
        counters = self.cache.counters
        issued = counters.prefetch_issued
        self.link.hold()
        self._prefetcher.advance(step, layer_idx)
        self._spend("prefetches", self._arm.times.issue_s * (counters.prefetch_issued - issued))
        self.link.release()

    def _reading_ahead(
        self, layers: list[list[ExpertKey]], *, sequence: int, step: int, traffic: ExpertTraffic
    ) -> float:
        """One forward pass in the executor's order; returns the seconds it waited for experts."""
        clock, prefetcher, times = self._clock, self._prefetcher, self._arm.times
        spend = self._spend
        foretold = self._arm.foretold
        missed = traffic.misses + traffic.late_hits
        stall_s = 0.0
        prefetcher.begin_step(is_decode=step > 0)
        is_asking = foretold is not None and step > 0 and prefetcher.wants_forecasts
        self.cache.advance(step, -1)
        if foretold is not None and is_asking:
            for forecast in foretold.before_token(sequence, step):
                prefetcher.offer(forecast)
        self._read_ahead(step, -1)
        spend("before the layers", times.begin_s)
        for layer_idx, needed in enumerate(layers):
            spend(f"layer {layer_idx}", times.layer_s)
            self.cache.advance(step, layer_idx)
            self.link.hold()
            with Acquisition(
                needed,
                cache=self.cache,
                transfers=self.link,
                prefetcher=prefetcher,
                traffic=traffic,
            ) as acquisition:
                missing = traffic.misses + traffic.late_hits - missed
                missed += missing
                spend("misses", times.miss_s * missing + (times.fetch_s if missing else 0.0))
                self.link.release()
                is_free = acquisition.is_reading
                if is_asking:
                    spend("forecasts", times.follow_s)
                is_due = is_asking and prefetcher.is_due(step, layer_idx, is_free=is_free)
                if foretold is not None and is_due:
                    for forecast in foretold.in_pass(sequence, step, layer_idx):
                        prefetcher.offer(forecast)
                    spend("forecasts", times.forecast_s)
                self._read_ahead(step, layer_idx)
                asked = clock.now
                for wave in acquisition.waves():
                    waited_s = clock.now - asked
                    stall_s += waited_s
                    spend(f"experts of layer {layer_idx}", times.wave(len(wave), waited_s=waited_s))
                    asked = clock.now
        spend("output", times.end_s)
        return stall_s

    def _on_demand(
        self, layers: list[list[ExpertKey]], *, sequence: int, step: int, traffic: ExpertTraffic
    ) -> float:
        """The same where nothing is read ahead: reads are in order, and their times a sum.

        The cache is asked exactly as Acquisition asks it; several times as fast.
        """
        cache, times = self.cache, self._arm.times
        lookup, record_use = cache.lookup, cache.record_use
        told = self._arm.foretold if cache.wants_forecasts and step else None
        stall_s = 0.0
        seconds = times.begin_s + times.end_s + len(layers) * times.layer_s
        cache.advance(step, -1)
        for forecast in told.before_token(sequence, step) if told is not None else ():
            cache.foresee(forecast)
        for layer_idx, needed in enumerate(layers):
            cache.advance(step, layer_idx)
            held: list[ExpertKey] = []
            missing: list[ExpertKey] = []
            for key in needed:
                (missing if lookup(key) is None else held).append(key)
                record_use(key)
            if missing:
                self._fetch(held, missing)
            for forecast in told.in_pass(sequence, step, layer_idx) if told is not None else ():
                cache.foresee(forecast)
            # Reads begin when all are submitted; what has arrived is computed, while others come.
            begun_s = times.miss_s * len(missing) + (times.fetch_s if missing else 0.0)
            done_s = begun_s + (times.wave(len(held), waited_s=0.0) if held else 0.0)
            arrivals = self.link.arrivals(len(missing), begun_s)
            first = 0
            while first < len(arrivals):
                waited_s = max(0.0, arrivals[first] - done_s)
                stall_s += waited_s
                done_s += waited_s
                after = bisect_right(arrivals, done_s, first + 1)
                done_s += times.wave(after - first, waited_s=waited_s)
                first = after
            seconds += done_s
            traffic.lookups += len(needed)
            traffic.hits_resident += len(held)
            traffic.misses += len(missing)
        traffic.bytes_on_demand = traffic.misses * self._arm.carriage.expert_bytes
        self._clock.now += seconds
        return stall_s

    def _fetch(self, held: list[ExpertKey], missing: list[ExpertKey]) -> None:
        cache = self.cache
        lease = cache.pin(held)
        slots = []
        for key in missing:
            slot = cache.reserve(key, Kind.ON_DEMAND)
            while slot is None:
                # More are needed than there are slots: what came first is computed and let go.
                lease.release()
                for loading in slots:
                    cache.commit(loading)
                slots.clear()
                slot = cache.reserve(key, Kind.ON_DEMAND)
            slots.append(slot)
        for slot in slots:
            cache.commit(slot)
        lease.release()


def _count_prefetches(traffic: ExpertTraffic, before: tuple, now: CacheCounters) -> None:
    _, _, issued, used, wasted, cancelled = before
    traffic.prefetch_issued += now.prefetch_issued - issued
    traffic.prefetch_used += now.prefetch_used - used
    traffic.prefetch_wasted += now.prefetch_wasted - wasted
    traffic.prefetch_cancelled += now.prefetch_cancelled - cancelled

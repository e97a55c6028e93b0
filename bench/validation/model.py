"""The simulator's times for this machine, from at most three configurations that were run on it.

Processor: a token costs a fixed time; a layer that lacks an expert and an expert asked for, now or
ahead, one each; weights are read at one speed. Link: a latency a read and a speed. Times are fitted
to single steps, the link by replay until it waits as long as the machine. What forecasts cost:
predictor and prefetcher run in the replay too, and are timed there; beside an engine, with cold
caches and copy threads that want the interpreter, that takes so much longer as in the run that
looked ahead.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ...runtime.experts.eviction import EVICTIONS
from ..forecaster import follow
from ..foretold import Foretold
from ..replay import COUNTS, Arm, Carriage, Replay, Schedule, StepTimes
from .machine import Observation

_AT = {name: index for index, name in enumerate(COUNTS)}
WARM_RUNS = 2
"""Replays before the one that counts, as the machine ran its untimed ones."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Seconds and bytes a second; `weight_bytes_per_s` is what products read weights at.

    `latency_s` is of one read of at most a piece, of which an expert takes several. Forecasts take
    `forecast_factor` times what they take outside of an engine.
    """

    token_s: float
    fetch_s: float
    miss_s: float
    weight_bytes_per_s: float
    latency_s: float
    link_bytes_per_s: float
    forecast_factor: float = 1.0

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Simulated:
    """A replay's figures, a token."""

    tokens_per_second: float
    stall_s: float
    misses: float


@dataclass(frozen=True, slots=True)
class Told:
    """What a predictor said along an observation, and processor seconds a layer that it took."""

    foretold: Foretold
    seconds: float


def simulate(machine: Machine, seen: Observation, told: Told | None) -> Simulated:
    """What `machine` would do with the routing that was observed, in that configuration."""
    schedule = Schedule(seen.routing, prompt_tokens=_prompt(seen), has_prompts=True)
    replay = Replay(schedule, _arm(machine, seen, told))
    for _ in range(WARM_RUNS):
        replay.run(range(schedule.num_sequences))
    sums = replay.run(range(schedule.num_sequences)).sum(axis=0)
    tokens = sums[_AT["tokens"]]
    return Simulated(
        tokens / sums[_AT["seconds"]],
        sums[_AT["stall_s"]] / tokens,
        sums[_AT["misses"]] / tokens,
    )


def _arm(machine: Machine, seen: Observation, told: Told | None) -> Arm:
    subject, one = seen.subject, seen.configuration
    layers, top_k = subject.num_moe_layers, subject.top_k
    expert_s = subject.expert_bytes / machine.weight_bytes_per_s
    dense_s = subject.active_bytes / machine.weight_bytes_per_s - layers * top_k * expert_s
    link = one.throttle_bytes_per_s
    # A throttled disk is never faster than the disk, and a piece waits for its share of time only.
    copy_s = seen.num_pieces * machine.latency_s
    copy_s += subject.expert_bytes / machine.link_bytes_per_s
    if link is not None:
        copy_s = max(copy_s, subject.expert_bytes / link)
    return Arm(
        num_slots=subject.num_slots,
        eviction=partial(EVICTIONS[one.eviction], seen.routing.shape, subject.num_slots),
        foretold=None if told is None else told.foretold,
        prefetch=one.prefetch,  # type: ignore[arg-type]
        carriage=Carriage(subject.expert_bytes, subject.expert_bytes / copy_s),
        times=StepTimes(
            begin_s=0.0,
            layer_s=(machine.token_s + dense_s) / layers,
            expert_s=expert_s,
            end_s=0.0,
            fetch_s=machine.fetch_s,
            miss_s=machine.miss_s,
            # Asked for, written down and woken up for as a miss is.
            issue_s=machine.miss_s,
            forecast_s=0.0 if told is None else machine.forecast_factor * told.seconds,
        ),
    )


def forecasts(seen: Observation) -> Told | None:
    """What the engine's predictor says along the observed routing; None where there is none.

    Its time is that of the predictor and of the prefetcher's decisions, on this processor, now.
    """
    if seen.configuration.prefetch == "off":
        return None
    prompt = _prompt(seen)
    layers, sequences = seen.subject.num_moe_layers, len(seen.routing.offsets) - 1
    began = time.process_time()
    foretold = follow(seen.make_predictor, seen.routing, prompt_tokens=prompt)
    decoded = (seen.routing.num_tokens - prompt * sequences) * layers
    predicting_s = (time.process_time() - began) / decoded
    told = Told(foretold, predicting_s)
    blank = Machine(1e-2, 0.0, 0.0, float("inf"), 0.0, 1e12)
    ahead = _arm(blank, seen, told)
    schedule = Schedule(seen.routing, prompt_tokens=prompt, has_prompts=True)
    taken_s = []
    for arm in (ahead, replace(ahead, foretold=None, prefetch="off")):
        replay = _ExecutorsWay(schedule, arm)
        replay.run(range(sequences))
        began = time.process_time()
        replay.run(range(sequences))
        taken_s.append(time.process_time() - began)
    return Told(foretold, predicting_s + max(0.0, taken_s[0] - taken_s[1]) / decoded)


class _ExecutorsWay(Replay):
    """As the executor goes about it, also where nothing is read ahead."""

    def _on_demand(self, layers: Any, **given: Any) -> float:
        return self._reading_ahead(layers, **given)


def _prompt(seen: Observation) -> int:
    """Tokens of each sequence before the first that was decoded."""
    sequences = len(seen.routing.offsets) - 1
    return int(np.diff(seen.routing.offsets)[0]) - len(seen.repetitions[0]) // sequences


def calibrate(seen: Sequence[Observation], told: Sequence[Told | None]) -> Machine:
    """A machine that does in the observed configurations what was observed.

    The first reads on demand. One that misses nothing fixes a token's own time; one of much larger
    experts the speeds of weights and link, which are else taken for unlimited; one that looks ahead
    what forecasts cost beside an engine. `told` is what each was told.
    """
    by_demand = [one for one, said in zip(seen, told, strict=True) if said is None]
    machine = _by_demand(by_demand)
    for one, said in zip(seen, told, strict=True):
        if said is not None:
            return replace(machine, forecast_factor=_forecast_factor(machine, one, said))
    return machine


def _forecast_factor(machine: Machine, seen: Observation, told: Told) -> float:
    """How many times what they were timed at lets the replay take as long as the machine."""
    wanted_s = _mean(seen, "wall_s")

    def token_s(factor: float) -> float:
        return (
            1.0 / simulate(replace(machine, forecast_factor=factor), seen, told).tokens_per_second
        )

    return _where(token_s, wanted_s, first=1.0, limit=1e3)


def _by_demand(seen: Sequence[Observation]) -> Machine:
    first = seen[0]
    large = max(seen, key=lambda one: one.subject.expert_bytes)
    resident = next((one for one in seen if not _mean(one, "misses")), None)
    fixed_s = None if resident is None else _busy_s(resident)
    fixed_s, fetch_s, miss_s = _fit_steps(first, fixed_s=fixed_s)
    machine = Machine(fixed_s, fetch_s, miss_s, float("inf"), 0.0, float("inf"))
    if large is not first:
        more = large.subject.active_bytes - first.subject.active_bytes
        rate = more / max(_busy_s(large) - _reading_s(machine, large) - fixed_s, 1e-9)
        token_s = max(0.0, fixed_s - first.subject.active_bytes / rate)
        machine = replace(machine, token_s=token_s, weight_bytes_per_s=rate)
    copy_s = _copy_s(machine, first)
    if large is first:
        return replace(machine, latency_s=copy_s / first.num_pieces)
    large_s = _copy_s(machine, large)
    # copy = pieces x latency + bytes / speed, twice.
    pieces = np.array([[first.num_pieces, first.subject.expert_bytes],
                       [large.num_pieces, large.subject.expert_bytes]], dtype=float)  # fmt: skip
    latency_s, byte_s = np.linalg.solve(pieces, np.array([copy_s, large_s]))
    if byte_s <= 0.0 or latency_s < 0.0:
        latency_s, byte_s = 0.0, large_s / large.subject.expert_bytes
    return replace(machine, latency_s=float(latency_s), link_bytes_per_s=float(1.0 / byte_s))


def _copy_s(machine: Machine, seen: Observation) -> float:
    """Time of one copy at which the replay waits as long as the machine did."""
    wanted = _mean(seen, "stall_s")

    def stall_s(copy_s: float) -> float:
        slow = replace(machine, latency_s=copy_s / seen.num_pieces, link_bytes_per_s=float("inf"))
        return simulate(slow, seen, None).stall_s

    return _where(stall_s, wanted, first=1e-4, limit=100.0)


def _where(rising: Callable[[float], float], wanted: float, *, first: float, limit: float) -> float:
    """Where a rising function has a value, to some 1e-4 of `first`; 0 if it is above that there."""
    low, high = 0.0, first
    while rising(high) < wanted and high < limit:
        low, high = high, 2.0 * high
    for _ in range(14):
        middle = (low + high) / 2.0
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2.0


def _reading_s(machine: Machine, seen: Observation) -> float:
    """Busy seconds a token that go to asking for experts, on demand."""
    lacking, misses = lacking_layers(seen).mean(axis=0)
    return machine.fetch_s * lacking + machine.miss_s * misses


def _busy_s(seen: Observation) -> float:
    return float(_busy(seen).mean())


def _busy(seen: Observation) -> np.ndarray:
    """Seconds that each step did not wait, the median of its repetitions."""
    return np.median(
        [[one.wall_s - one.stall_s for one in steps] for steps in seen.repetitions], axis=0
    )


def _mean(seen: Observation, field: str) -> float:
    return float(np.mean([getattr(one, field) for steps in seen.repetitions for one in steps]))


class _LackingLayers(Replay):
    """Counts, per decode step, the layers that lacked an expert and the experts they lacked."""

    def __init__(self, schedule: Schedule, arm: Arm) -> None:
        super().__init__(schedule, arm)
        self.steps: list[tuple[int, int]] = []
        self._fetches = 0

    def _on_demand(self, layers: Any, **given: Any) -> float:
        self._fetches = 0
        misses = given["traffic"].misses
        stall_s = super()._on_demand(layers, **given)
        if given["step"]:
            self.steps.append((self._fetches, given["traffic"].misses - misses))
        return stall_s

    def _fetch(self, held: Any, missing: Any) -> None:
        self._fetches += 1
        super()._fetch(held, missing)


def lacking_layers(seen: Observation) -> np.ndarray:
    """[steps, 2]: layers that lacked an expert and experts they lacked, read on demand, warm."""
    blank = Machine(0.0, 0.0, 0.0, float("inf"), 0.0, 1e12)
    schedule = Schedule(seen.routing, prompt_tokens=_prompt(seen), has_prompts=True)
    replay = _LackingLayers(schedule, _arm(blank, seen, None))
    for _ in range(WARM_RUNS + 1):
        replay.steps.clear()
        replay.run(range(schedule.num_sequences))
    return np.array(replay.steps, dtype=float)


def _fit_steps(seen: Observation, *, fixed_s: float | None) -> tuple[float, float, float]:
    """Fixed seconds of a step, and seconds a lacking layer and a miss, of the busy time.

    None is below 0: where least squares would have it so, that term is left out.
    """
    counts = lacking_layers(seen)
    table = np.column_stack([np.ones(len(counts)), counts])
    busy = _busy(seen)
    kept = busy <= np.quantile(busy, 0.98)
    known = fixed_s or 0.0
    columns = [0, 1, 2] if fixed_s is None else [1, 2]
    while True:
        found = np.linalg.lstsq(table[kept][:, columns], busy[kept] - known, rcond=None)[0]
        negative = [one for one, value in zip(columns, found, strict=True) if value < 0.0]
        if not negative:
            times = {0: known} | dict(zip(columns, map(float, found), strict=True))
            return times[0], times.get(1, 0.0), times.get(2, 0.0)
        columns.remove(max(negative))

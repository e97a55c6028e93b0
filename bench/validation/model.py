"""The simulator's times for this machine, from at most three configurations that were run on it.

Processor: a token costs a fixed time, an asked-for miss, a layer's forecasts and an issued prefetch
one each, and weights are read at one speed. Link: a latency and a speed. Times are fitted to single
steps, the link by replay until it waits as long as the machine did.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

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
    """Seconds and bytes a second; `weight_bytes_per_s` is what products read weights at."""

    token_s: float
    miss_s: float
    forecast_s: float
    issue_s: float
    weight_bytes_per_s: float
    latency_s: float
    link_bytes_per_s: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Simulated:
    """A replay's figures, a token."""

    tokens_per_second: float
    stall_s: float
    misses: float


def simulate(machine: Machine, seen: Observation, told: Foretold | None) -> Simulated:
    """What `machine` would do with the routing that was observed, in that configuration."""
    subject, one = seen.subject, seen.configuration
    layers, top_k = subject.num_moe_layers, subject.top_k
    expert_s = subject.expert_bytes / machine.weight_bytes_per_s
    dense_s = subject.active_bytes / machine.weight_bytes_per_s - layers * top_k * expert_s
    link = one.throttle_bytes_per_s
    # A throttled disk is never faster than the disk, and a piece waits for its share of time only.
    copy_s = machine.latency_s + subject.expert_bytes / machine.link_bytes_per_s
    if link is not None:
        copy_s = max(copy_s, subject.expert_bytes / link)
    arm = Arm(
        num_slots=subject.num_slots,
        eviction=partial(EVICTIONS[one.eviction], seen.routing.shape, subject.num_slots),
        foretold=told,
        prefetch=one.prefetch,  # type: ignore[arg-type]
        carriage=Carriage(subject.expert_bytes, subject.expert_bytes / copy_s),
        times=StepTimes(
            begin_s=0.0,
            layer_s=(machine.token_s + dense_s) / layers,
            expert_s=expert_s,
            end_s=0.0,
            miss_s=machine.miss_s,
            forecast_s=machine.forecast_s,
            issue_s=machine.issue_s,
        ),
    )
    prompt = int(np.diff(seen.routing.offsets)[0]) - len(seen.repetitions[0]) // (
        len(seen.routing.offsets) - 1
    )
    schedule = Schedule(seen.routing, prompt_tokens=prompt, has_prompts=True)
    replay = Replay(schedule, arm)
    for _ in range(WARM_RUNS):
        replay.run(range(schedule.num_sequences))
    sums = replay.run(range(schedule.num_sequences)).sum(axis=0)
    tokens = sums[_AT["tokens"]]
    return Simulated(
        tokens / sums[_AT["seconds"]],
        sums[_AT["stall_s"]] / tokens,
        sums[_AT["misses"]] / tokens,
    )


def forecasts(seen: Observation) -> Foretold | None:
    """What the engine's predictor says along the observed routing; None where there is none."""
    if seen.configuration.prefetch == "off":
        return None
    prompt = int(np.diff(seen.routing.offsets)[0]) - len(seen.repetitions[0]) // (
        len(seen.routing.offsets) - 1
    )
    return follow(seen.make_predictor, seen.routing, prompt_tokens=prompt)


def calibrate(seen: Sequence[Observation], told: Sequence[Foretold | None]) -> Machine:
    """A machine that does in the observed configurations what was observed.

    The first must read on demand; one that forecasts and one of much larger experts make the rest
    known, which is else taken for nothing, or for the first's.
    """
    first = seen[0]
    large = max(seen, key=lambda one: one.subject.expert_bytes)
    ahead = next((one for one in seen if one.configuration.prefetch != "off"), None)
    token_s, miss_s = _fit_line(first)
    busy_first = token_s
    weight_rate = float("inf")
    if large is not first:
        more = large.subject.active_bytes - first.subject.active_bytes
        busy_large = _busy_s(large) - miss_s * _mean(large, "misses")
        weight_rate = more / max(busy_large - busy_first, 1e-9)
        token_s = busy_first - first.subject.active_bytes / weight_rate
    machine = Machine(max(token_s, 0.0), miss_s, 0.0, 0.0, weight_rate, 0.0, float("inf"))
    if ahead is not None:
        extra = _busy_s(ahead) - busy_first - miss_s * _mean(ahead, "misses")
        layers = ahead.subject.num_moe_layers
        issued = _mean(ahead, "issued")
        issue_s = min(miss_s, extra / issued if issued else 0.0)
        forecast_s = max(0.0, extra - issue_s * issued) / layers
        machine = _with(machine, forecast_s=forecast_s, issue_s=max(issue_s, 0.0))
    latency_s = _solve(
        lambda value: simulate(_with(machine, latency_s=value), first, told[0]).stall_s,
        wanted=_mean(first, "stall_s"),
    )
    machine = _with(machine, latency_s=latency_s)
    if large is not first:
        place = list(seen).index(large)
        # Of the large copy's time, what is not latency is the link's.
        total_s = _solve(
            lambda value: simulate(_with(machine, latency_s=value), large, told[place]).stall_s,
            wanted=_mean(large, "stall_s"),
        )
        more_bytes = large.subject.expert_bytes - first.subject.expert_bytes
        rate = more_bytes / max(total_s - latency_s, 1e-9)
        machine = _with(
            machine,
            link_bytes_per_s=rate,
            latency_s=max(0.0, latency_s - first.subject.expert_bytes / rate),
        )
    return machine


def _with(machine: Machine, **fields: float) -> Machine:
    return Machine(**(machine.as_dict() | fields))


def _steps(seen: Observation) -> np.ndarray:
    """[steps, 3] of busy seconds, misses and issued prefetches, without outliers."""
    table = np.array(
        [
            (one.wall_s - one.stall_s, one.misses, one.issued)
            for steps in seen.repetitions
            for one in steps
        ]
    )
    return table[table[:, 0] <= np.quantile(table[:, 0], 0.98)]


def _busy_s(seen: Observation) -> float:
    return float(_steps(seen)[:, 0].mean())


def _mean(seen: Observation, field: str) -> float:
    return float(np.mean([getattr(one, field) for steps in seen.repetitions for one in steps]))


def _fit_line(seen: Observation) -> tuple[float, float]:
    """Fixed seconds of a step, and seconds a miss, of the busy time."""
    table = _steps(seen)
    matrix = np.stack([np.ones(len(table)), table[:, 1]], axis=1)
    fixed, slope = np.linalg.lstsq(matrix, table[:, 0], rcond=None)[0]
    if slope < 0.0:
        return float(table[:, 0].mean()), 0.0
    return float(fixed), float(slope)


def _solve(stall_s: Callable[[float], float], *, wanted: float) -> float:
    """The copy time at which the replay waits as long as wanted; it grows with it."""
    low, high = 0.0, 1e-4
    while stall_s(high) < wanted and high < 100.0:
        low, high = high, 2.0 * high
    for _ in range(24):
        middle = (low + high) / 2.0
        low, high = (middle, high) if stall_s(middle) < wanted else (low, middle)
    return (low + high) / 2.0

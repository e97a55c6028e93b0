"""The simulator's times for this machine, from at most three configurations that were run on it.

Processor: a token costs a fixed time; a layer that lacks an expert, an expert asked for and one
read ahead, one each: fitted to single steps. What reads, calls of the experts' kernel and a wait
that has ended take: measured apart (`apart`). What forecasts cost: predictor and prefetcher run in
the replay too, and are timed there; beside an engine, with cold caches and copy threads that want
the interpreter, that takes so much longer as in the run that looked ahead.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ...runtime.experts.eviction import EVICTIONS
from ..forecaster import follow
from ..replay import COUNTS, Arm, Carriage, Replay, Schedule, StepTimes
from .apart import Interruption, ReadTimes
from .machine import Observation
from .told import Told, timed

_AT = {name: index for index, name in enumerate(COUNTS)}
WARM_RUNS = 2
"""Replays before the one that counts, as the machine ran its untimed ones."""
NUM_TIMED = 3
"""Times that a predictor is followed, to know what it takes."""
NUM_FITS = 3
"""What reads cost and how often they are waited for depend on each other: found in turns."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Seconds, and bytes a second that products read dense weights at.

    A wait costs `wake_s` and `wake_share` of its length afterwards; `issue_s` is of an expert read
    ahead. A layer that lacks an expert or has forecasts costs `leave_s`, since no native pass goes
    on through it; forecasts take `forecast_factor` times what they take outside of an engine.
    """

    token_s: float
    fetch_s: float
    miss_s: float
    wake_s: float
    wake_share: float
    dense_bytes_per_s: float
    issue_s: float = 0.0
    leave_s: float = 0.0
    forecast_factor: float = 1.0

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


BLANK = Machine(0.0, 0.0, 0.0, 0.0, 0.0, float("inf"))
"""Nothing but calls of the kernel takes time."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """A replay's figures, a token."""

    tokens_per_second: float
    stall_s: float
    misses: float


def simulate(machine: Machine, seen: Observation, told: Told | None) -> Simulated:
    """What `machine` would do with the routing that was observed, in that configuration."""
    tokens, sums = _sums(Replay(_schedule(seen), _arm(machine, seen, told)))
    return Simulated(
        tokens / sums[_AT["seconds"]],
        sums[_AT["stall_s"]] / tokens,
        sums[_AT["misses"]] / tokens,
    )


def _schedule(seen: Observation) -> Schedule:
    return Schedule(seen.routing, prompt_tokens=_prompt(seen), has_prompts=True)


def _sums(replay: Replay) -> tuple[float, np.ndarray]:
    """Decode steps of a replay that is warm, and the sums of its table."""
    sequences = range(replay.schedule.num_sequences)
    for _ in range(WARM_RUNS):
        replay.run(sequences)
    sums = replay.run(sequences).sum(axis=0)
    return float(sums[_AT["tokens"]]), sums


def _arm(machine: Machine, seen: Observation, told: Told | None) -> Arm:
    subject, one = seen.subject, seen.configuration
    layers = subject.num_moe_layers
    dense_s = _dense_bytes(seen) / machine.dense_bytes_per_s
    link, send_s = one.throttle_bytes_per_s, seen.reads.send_s
    # A throttled disk is never faster than the disk.
    if link is not None:
        send_s = max(send_s, subject.expert_bytes / link)
    return Arm(
        num_slots=subject.num_slots,
        eviction=partial(EVICTIONS[one.eviction], seen.routing.shape, subject.num_slots),
        foretold=None if told is None else told.foretold,
        prefetch=one.prefetch,  # type: ignore[arg-type]
        carriage=Carriage(
            subject.expert_bytes, subject.expert_bytes / send_s, seen.reads.latency_s
        ),
        times=StepTimes(
            begin_s=0.0,
            layer_s=(machine.token_s + dense_s) / layers,
            expert_s=seen.calls.expert_s,
            end_s=0.0,
            # Where something is asked, the native pass was left before something was lacking.
            fetch_s=machine.fetch_s + (machine.leave_s if told is None else 0.0),
            miss_s=machine.miss_s,
            issue_s=machine.issue_s,
            follow_s=0.0 if told is None else _follow_s(machine, told),
            forecast_s=0.0 if told is None else machine.forecast_factor * told.in_pass_s,
            wave_s=seen.calls.wave_s,
            wake_s=machine.wake_s,
            wake_share=machine.wake_share,
        ),
    )


def _follow_s(machine: Machine, told: Told) -> float:
    return machine.leave_s + machine.forecast_factor * told.seconds


def _dense_bytes(seen: Observation) -> int:
    """Weights that a token reads apart from its experts."""
    subject = seen.subject
    routed = subject.num_moe_layers * subject.top_k * subject.expert_bytes
    return subject.active_bytes - routed


def forecasts(seen: Observation) -> Told | None:
    """What the engine's predictor says along the observed routing; None where there is none.

    Its time is that of the predictor and of the prefetcher's decisions, on this processor, now.
    """
    if seen.configuration.prefetch == "off":
        return None
    prompt = _prompt(seen)
    layers, sequences = seen.subject.num_moe_layers, len(seen.routing.offsets) - 1
    decoded = (seen.routing.num_tokens - prompt * sequences) * layers
    taken_s = []
    for _ in range(NUM_TIMED):
        asked: list[float] = []
        began = time.process_time()
        foretold = follow(
            partial(timed, seen.make_predictor, asked),
            seen.routing,
            prompt_tokens=prompt,
        )
        predicting_s = time.process_time() - began
        in_pass_s = sum(asked)
        taken_s.append(
            (predicting_s - in_pass_s, _deciding_s(seen, Told(foretold, 0.0)), in_pass_s)
        )
    following_s, deciding_s, in_pass_s = np.median(taken_s, axis=0) / decoded
    return Told(foretold, float(following_s + deciding_s), float(in_pass_s))


def _deciding_s(seen: Observation, told: Told) -> float:
    """Processor time of a replay that the prefetcher takes part in, beyond one that it does not."""
    ahead = _arm(replace(BLANK, token_s=1e-2), replace(seen, reads=ReadTimes(0.0, 1e-6)), told)
    taken_s = []
    for arm in (ahead, replace(ahead, foretold=None, prefetch="off")):
        replay = _ExecutorsWay(_schedule(seen), arm)
        sequences = range(replay.schedule.num_sequences)
        replay.run(sequences)
        began = time.process_time()
        replay.run(sequences)
        taken_s.append(time.process_time() - began)
    return max(0.0, taken_s[0] - taken_s[1])


class _ExecutorsWay(Replay):
    """As the executor goes about it, also where nothing is read ahead."""

    def _on_demand(self, layers: Any, **given: Any) -> float:
        return self._reading_ahead(layers, **given)


def _prompt(seen: Observation) -> int:
    """Tokens of each sequence before the first that was decoded."""
    sequences = len(seen.routing.offsets) - 1
    return int(np.diff(seen.routing.offsets)[0]) - len(seen.repetitions[0]) // sequences


def calibrate(
    seen: Sequence[Observation], told: Sequence[Told | None], interruption: Interruption
) -> Machine:
    """A machine that does in the observed configurations what was observed.

    The first reads on demand. One that misses nothing fixes a token's own time; one of much larger
    experts the speed of dense weights, which is else taken for unlimited; one that looks ahead
    what forecasts cost beside an engine. `told` is what each was told.
    """
    by_demand = [one for one, said in zip(seen, told, strict=True) if said is None]
    machine = _by_demand(by_demand, interruption)
    for one, said in zip(seen, told, strict=True):
        if said is not None:
            machine = replace(machine, issue_s=_issue_s(one))
            return replace(machine, forecast_factor=_forecast_factor(machine, one, said))
    return machine


def _issue_s(seen: Observation) -> float:
    """What one more prefetch adds to the busy time of a step, misses apart."""
    busy = _busy(seen)
    table = np.column_stack([np.ones(len(busy)), _counts(seen, "misses"), _counts(seen, "issued")])
    kept = busy <= np.quantile(busy, 0.98)
    return max(0.0, float(np.linalg.lstsq(table[kept], busy[kept], rcond=None)[0][2]))


def _counts(seen: Observation, field: str) -> np.ndarray:
    """Of each step, the mean of its repetitions."""
    return np.mean([[getattr(one, field) for one in steps] for steps in seen.repetitions], axis=0)


def _forecast_factor(machine: Machine, seen: Observation, told: Told) -> float:
    """How many times what they were timed at lets the replay take as long as the machine."""
    wanted_s = _mean(seen, "wall_s")

    def token_s(factor: float) -> float:
        return (
            1.0 / simulate(replace(machine, forecast_factor=factor), seen, told).tokens_per_second
        )

    return _where(token_s, wanted_s, first=1.0, limit=1e3)


def _by_demand(seen: Sequence[Observation], interruption: Interruption) -> Machine:
    first = seen[0]
    large = max(seen, key=lambda one: one.subject.expert_bytes)
    resident = next((one for one in seen if not _mean(one, "misses")), None)
    machine = replace(BLANK, **asdict(interruption))
    if resident is not None:
        token_s = _busy_s(resident) - _mean_busy(simulated_steps(machine, resident, None))
        machine = replace(machine, token_s=max(0.0, token_s))
    for _ in range(NUM_FITS):
        machine = _with_costs(machine, first, is_token_known=resident is not None)
    if large is not first:
        # token = own time + dense bytes / speed, twice.
        more_s = _busy_s(large) - _mean_busy(simulated_steps(machine, large, None))
        more = _dense_bytes(large) - _dense_bytes(first)
        if more_s > 0.0 and more > 0:
            rate = more / more_s
            token_s = max(0.0, machine.token_s - _dense_bytes(first) / rate)
            machine = replace(machine, token_s=token_s, dense_bytes_per_s=rate)
    return machine


def _where(rising: Callable[[float], float], wanted: float, *, first: float, limit: float) -> float:
    """Where a rising function has a value, to some 1e-4 of `first`; 0 if it is above that there."""
    low, high = 0.0, first
    while rising(high) < wanted and high < limit:
        low, high = high, 2.0 * high
    for _ in range(14):
        middle = (low + high) / 2.0
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2.0


def _busy_s(seen: Observation) -> float:
    return float(_busy(seen).mean())


def _busy(seen: Observation) -> np.ndarray:
    """Seconds that each step did not wait, the median of its repetitions."""
    return np.median(
        [[one.wall_s - one.stall_s for one in steps] for steps in seen.repetitions], axis=0
    )


def _mean(seen: Observation, field: str) -> float:
    """Of the steps; the median of the repetitions."""
    means = [np.mean([getattr(one, field) for one in steps]) for steps in seen.repetitions]
    return float(np.median(means))


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """One decode step: seconds at work and waiting, layers that lacked experts (counted on demand
    alone), experts they lacked, and prefetches issued.
    """

    busy_s: float
    stall_s: float
    lacking: int
    misses: int
    issued: int


class _StepByStep(Replay):
    """Writes down each decode step."""

    def __init__(self, schedule: Schedule, arm: Arm) -> None:
        super().__init__(schedule, arm)
        self.steps: list[SimulatedStep] = []
        self._num_lacking = 0

    def _on_demand(self, layers: Any, **given: Any) -> float:
        return self._noted(super()._on_demand, layers, **given)

    def _reading_ahead(self, layers: Any, **given: Any) -> float:
        return self._noted(super()._reading_ahead, layers, **given)

    def _noted(self, serve: Callable[..., float], layers: Any, **given: Any) -> float:
        self._num_lacking = 0
        misses, began = given["traffic"].misses, self._clock.now
        issued = self.cache.counters.prefetch_issued
        stall_s = serve(layers, **given)
        if given["step"]:
            self.steps.append(
                SimulatedStep(
                    busy_s=self._clock.now - began - stall_s,
                    stall_s=stall_s,
                    lacking=self._num_lacking,
                    misses=given["traffic"].misses - misses,
                    issued=self.cache.counters.prefetch_issued - issued,
                )
            )
        return stall_s

    def _fetch(self, held: Any, missing: Any) -> None:
        self._num_lacking += 1
        super()._fetch(held, missing)


def simulated_steps(machine: Machine, seen: Observation, told: Told | None) -> list[SimulatedStep]:
    """What `simulate` sums up, step by step."""
    replay = _StepByStep(_schedule(seen), _arm(machine, seen, told))
    for _ in range(WARM_RUNS + 1):
        replay.steps.clear()
        replay.run(range(replay.schedule.num_sequences))
    return replay.steps


def _mean_busy(steps: Sequence[SimulatedStep]) -> float:
    return float(np.mean([one.busy_s for one in steps]))


def _with_costs(machine: Machine, seen: Observation, *, is_token_known: bool) -> Machine:
    """What a lacking layer and a miss cost the processor, of the busy time of single steps; and a
    token where that is not known.

    None is below 0: where least squares would have it so, that term is left out.
    """
    names = ["fetch_s", "miss_s"] if is_token_known else ["token_s", "fetch_s", "miss_s"]
    steps = simulated_steps(machine, seen, None)
    columns = {
        "token_s": np.ones(len(steps)),
        "fetch_s": np.array([one.lacking for one in steps], dtype=float),
        "miss_s": np.array([one.misses for one in steps], dtype=float),
    }
    busy = _busy(seen)
    kept = busy <= np.quantile(busy, 0.98)
    # Calls and waits cost what they do with the costs so far, which are taken out again.
    wanted = busy - [one.busy_s for one in steps]
    wanted += sum(getattr(machine, name) * columns[name] for name in names)
    wanted, free = wanted[kept], replace(machine, **dict.fromkeys(names, 0.0))
    while names:
        table = np.column_stack([columns[name][kept] for name in names])
        found = np.linalg.lstsq(table, wanted, rcond=None)[0]
        if (found >= 0.0).all():
            return replace(free, **dict(zip(names, map(float, found), strict=True)))
        names.remove(max(name for name, value in zip(names, found, strict=True) if value < 0.0))
    return free

"""Whether looking ahead pays: the controller behind `auto`.

An estimate decides where the answer is clear (`outlook`), the clock where it is not: the durations
of whole steps, so that whatever forecasts and reads ahead cost counts, the predictor's own time
included. Knows neither forecasts nor experts.
"""

import math
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import replace
from enum import Enum
from statistics import fmean, median, stdev
from typing import NamedTuple

from .outlook import ENOUGH_ABSENT, MIN_GAIN, Outlook, Verdict, Window

FIRST_STEPS = 4
"""Steps before anything is asked: what a cold cache takes says little."""

ASKED_STEPS = 2
"""Steps that ask and read nothing ahead; the last is counted, in the first the predictor sees what
it missed."""

MORE_STEPS = 6
"""Steps that ask in addition, where too few experts were absent to tell."""

ON_STEPS, OFF_STEPS = 6, 4
"""Length of a trial's window. Its first steps are not counted: of one with look-ahead two, in which
reads get under way and the predictor sees what it missed; of one without it one."""

MIN_PAIRS, MAX_PAIRS = 2, 8
"""Of windows in a trial. One alone is believed only if look-ahead is slower by a log ratio of
HOPELESS, two standard errors granted, or takes more than all the stall that there is to hide.
"""

HOPELESS = 0.3

REGRET = 0.01
"""Share of all time so far that trials in doubt may cost."""

WASTE = 0.3
"""Of a step, what a trial is taken to cost beside the forecasts before it is known: planning, reads
in vain. Measured steps of nano lost 0.45 in a trial."""

MIN_SPREAD = 0.02
"""Least standard deviation of the log ratio of two windows; else it is taken from the pairs or from
the steps within the windows, whichever is larger: two pairs may agree by chance."""

MEDIAN_ERROR = 1.25
"""Standard error of a median in those of a mean, for normal values (the root of pi / 2)."""

BAD_CONTROL = 0.1
"""A control that finds look-ahead slower by this log ratio is repeated soon, and believed if the
next one agrees."""

CAUTION, LAST_CAUTION = 1.3, 0.5
"""Standard errors by which a trial has to be ahead of MIN_GAIN, and after its last pair; to be
behind, one is enough."""

SHORT_RUN, FIRST_RUN, MAX_RUN = 16, 64, 256
"""Steps with look-ahead between two controls without it: after a bad one, at first, and at most;
doubled after each good one."""

SHORT_PAUSE = 16
"""Steps of rest after a trial that has shown nothing either way."""

FIRST_PAUSE, MAX_PAUSE = 64, 4096
"""Steps without look-ahead between two estimates; doubled after each that advised against it."""

REST_STEPS = 16
"""Of a pause, the steps after which what is known is held against the stall anew."""

MAX_REMEMBERED = 64


class Stretch(NamedTuple):
    """So many steps, looking so many moments ahead; `is_asking`: forecasts are made at all."""

    steps: int
    reach: int = 0
    is_asking: bool = False


# Yields the next stretch, is sent what it measured.
Stretches = Generator[Stretch, Window, None]
Rest = Generator[Stretch, Window, Window]
Trial = Generator[Stretch, Window, "Outcome"]


class Outcome(Enum):
    """What a trial has shown."""

    PAYS = "pays"
    COSTS = "costs"
    OPEN = "open"


class Pair(NamedTuple):
    """A window with look-ahead against those without it before and after.

    `gain` is the log ratio of their steps, above 0 where look-ahead is faster; `error` what the
    spread of the steps lets expect of it.
    """

    gain: float
    error: float
    on: Window
    off: Window


class GainController:
    """Looks ahead where that is faster, and spends next to nothing on finding out.

    `reach` is what holds now, 0 for none, and unless `is_asking` the predictor need not be asked at
    all; `is_promising` until something speaks against it. After a few steps two ask for forecasts
    without reading ahead. Where the stall could not pay for them, nothing is tried; where it would
    twice over, a trial begins at once; in doubt it waits until it costs no more than REGRET of all
    time so far. A trial compares windows with look-ahead with those without before and after them,
    so that drift cancels, until the interval of their log ratio leaves MIN_GAIN. Where it paid,
    look-ahead goes on, with ever rarer controls. Where nothing was shown, it is soon tried again.
    Where it costs, it rests, ever longer, and the next trial looks less far ahead, in case it was
    the reads and not the forecasts that cost.
    """

    def __init__(self, max_reach: int) -> None:
        self.reach = 0
        self.is_asking = False
        self.is_promising = True
        self._max_reach = max_reach
        self._outlook = Outlook()
        self._credit_s = 0.0
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=MAX_REMEMBERED)
        self._num_absent = self._num_foreseen = 0
        self._run = self._course()
        self._begin(next(self._run))

    def end_step(
        self,
        *,
        wall_s: float,
        stall_s: float,
        forecast_s: float = 0.0,
        num_absent: int = 0,
        num_foreseen: int = 0,
    ) -> None:
        """One decode step took `wall_s`, in `stall_s` of which compute waited for experts.

        Forecasts took `forecast_s`; of `num_absent` experts that held no slot they had spoken of
        `num_foreseen` as worth a read.
        """
        self._credit_s += REGRET * wall_s
        self._num_left -= 1
        if self._num_left < self._num_counted:
            self._steps.append((wall_s, stall_s, forecast_s))
            self._num_absent += num_absent
            self._num_foreseen += num_foreseen
        if not self._num_left:
            self._begin(self._run.send(self._window()))

    def _window(self) -> Window:
        wall_s, stall_s, forecast_s = (median(values) for values in zip(*self._steps, strict=True))
        logs = [math.log(max(step[0], 1e-9)) for step in self._steps]
        error = MEDIAN_ERROR * stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
        return Window(wall_s, stall_s, forecast_s, self._num_absent, self._num_foreseen, error)

    def _begin(self, stretch: Stretch) -> None:
        self._num_left, self.reach, self.is_asking = stretch
        self._num_counted = self._num_left - (2 if self.reach else 1)
        self._steps.clear()
        self._num_absent = self._num_foreseen = 0

    def _course(self) -> Stretches:
        rest = yield Stretch(FIRST_STEPS)
        pause, reach = FIRST_PAUSE, self._max_reach
        while True:
            self._outlook.see((yield from self._ask(rest)))
            verdict = self._outlook.verdict(rest)
            num_rested = 0
            while not self._may_try(verdict, rest) and num_rested < pause:
                rest = yield Stretch(REST_STEPS)
                # In doubt it is credit that is waited for, and asking again would only cost some.
                num_rested += REST_STEPS if verdict is Verdict.NO else 0
                verdict = self._outlook.verdict(rest)
            self.is_promising = verdict is not Verdict.NO
            if self._may_try(verdict, rest):
                outcome = yield from self._trial(reach, rest)
                if outcome is Outcome.OPEN:
                    rest = yield from self._rest(SHORT_PAUSE)
                    continue
                if outcome is Outcome.PAYS:
                    self._outlook = Outlook()
                    yield from self._exploit(reach)
                    pause, reach = FIRST_PAUSE, self._max_reach
                else:
                    reach = reach // 4 or self._max_reach
                rest = yield from self._rest(pause)
            self._outlook.forget()
            pause = min(2 * pause, MAX_PAUSE)

    def _ask(self, rest: Window) -> Rest:
        asked = yield Stretch(ASKED_STEPS, is_asking=True)
        self._credit_s -= ASKED_STEPS * asked.forecast_s
        if asked.num_absent < ENOUGH_ABSENT and self._outlook.has_stall(rest):
            more = yield Stretch(MORE_STEPS, is_asking=True)
            self._credit_s -= MORE_STEPS * more.forecast_s
            asked = replace(
                more,
                num_absent=asked.num_absent + more.num_absent,
                num_foreseen=asked.num_foreseen + more.num_foreseen,
            )
        return asked

    def _rest(self, steps: int) -> Rest:
        rest = yield Stretch(steps)
        return rest

    def _may_try(self, verdict: Verdict, rest: Window) -> bool:
        if verdict is Verdict.DOUBT:
            return self._credit_s >= ON_STEPS * (self._outlook.cost_s + WASTE * rest.wall_s)
        return verdict is Verdict.YES

    def _trial(self, reach: int, before: Window) -> Trial:
        pairs: list[Pair] = []
        while True:
            on = yield Stretch(ON_STEPS, reach, True)
            after = yield Stretch(OFF_STEPS)
            self._credit_s -= ON_STEPS * max(0.0, on.wall_s - after.wall_s)
            pairs.append(_pair(before, on, after))
            before = after
            outcome = _outcome(pairs)
            if outcome is None and self._credit_s < 0.0 and _is_behind(pairs):
                outcome = Outcome.OPEN
            if outcome is not None:
                self.is_promising = outcome is not Outcome.COSTS
                if outcome is Outcome.COSTS:
                    self._outlook.learn(
                        on=_middle([pair.on for pair in pairs]),
                        off=_middle([pair.off for pair in pairs]),
                    )
                return outcome

    def _exploit(self, reach: int) -> Stretches:
        gains: deque[float] = deque(maxlen=4)
        num_steps = FIRST_RUN
        while len(gains) < 2 or fmean(gains) > 0.0:
            before = yield Stretch(num_steps, reach, True)
            off = yield Stretch(OFF_STEPS)
            after = yield Stretch(ON_STEPS, reach, True)
            gains.append((_log_ratio(off, before) + _log_ratio(off, after)) / 2.0)
            is_bad = gains[-1] < -BAD_CONTROL
            if is_bad and len(gains) > 1 and gains[-2] < -BAD_CONTROL:
                return
            num_steps = SHORT_RUN if is_bad else min(2 * max(num_steps, FIRST_RUN), MAX_RUN)


def _log_ratio(off: Window, on: Window) -> float:
    """Above 0 where look-ahead is faster."""
    return math.log(max(off.wall_s, 1e-9) / max(on.wall_s, 1e-9))


def _middle(windows: Sequence[Window]) -> Window:
    wall_s, stall_s = (
        median(values)
        for values in zip(*((one.wall_s, one.stall_s) for one in windows), strict=True)
    )
    return Window(wall_s, stall_s)


def _pair(before: Window, on: Window, after: Window) -> Pair:
    return Pair(
        gain=(_log_ratio(before, on) + _log_ratio(after, on)) / 2.0,
        error=math.hypot(on.error, before.error / 2.0, after.error / 2.0),
        on=on,
        off=_middle([before, after]),
    )


def _is_behind(pairs: Sequence[Pair]) -> bool:
    return len(pairs) >= MIN_PAIRS and fmean(pair.gain for pair in pairs) < 0.0


def _outcome(pairs: Sequence[Pair]) -> Outcome | None:
    """What is shown so far, None while the trial has to go on."""
    gains = [pair.gain for pair in pairs]
    mean = fmean(gains)
    if len(pairs) < MIN_PAIRS:
        on, off = pairs[-1].on, pairs[-1].off
        is_dear = mean < 0.0 and on.busy_s - off.busy_s > off.stall_s
        is_hopeless = mean + 2.0 * max(MIN_SPREAD, pairs[-1].error) < -HOPELESS
        return Outcome.COSTS if is_hopeless or is_dear else None
    within = math.sqrt(fmean(pair.error**2 for pair in pairs))
    error = max(MIN_SPREAD, stdev(gains), within) / math.sqrt(len(gains))
    # Going on where it costs is dearer than resting where it pays: there is always a next trial.
    if mean - CAUTION * error > MIN_GAIN:
        return Outcome.PAYS
    if mean + error < MIN_GAIN:
        return Outcome.COSTS
    if len(pairs) < MAX_PAIRS:
        return None
    return Outcome.PAYS if mean - LAST_CAUTION * error > MIN_GAIN else Outcome.OPEN

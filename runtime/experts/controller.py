"""Whether looking ahead pays: the controller behind `auto`.

An estimate decides where the answer is clear (`outlook`), the clock where it is not: the durations
of whole steps, so that whatever forecasts and reads ahead cost counts, the predictor's own time
included. Knows neither forecasts nor experts.
"""

import math
from collections import deque
from collections.abc import Generator
from statistics import fmean, median, stdev
from typing import NamedTuple

from .outlook import MIN_GAIN, Outlook, Verdict, Window

FIRST_STEPS = 4
"""Steps before anything is asked: what a cold cache takes says little."""

ASKED_STEPS = 2
"""Steps that ask and read nothing ahead; the last is counted, in the first the predictor sees what
it missed."""

ON_STEPS, OFF_STEPS = 6, 4
"""Length of a trial's window. Its first steps are not counted: of one with look-ahead two, in which
reads get under way and the predictor sees what it missed; of one without it one."""

MIN_PAIRS, MAX_PAIRS = 2, 6
"""Of windows in a trial. One alone is believed if look-ahead is slower by a log ratio of HOPELESS.
"""

HOPELESS = 0.5

REGRET = 0.01
"""Share of all time so far that trials in doubt may cost."""

WASTE = 0.1
"""Of a step, what a trial's reads in vain are taken to cost before it is known."""

UNKNOWN_SPREAD, MIN_SPREAD = 0.1, 0.02
"""Standard deviation of the log ratio of two windows: before two pairs are known, and at least."""

CAUTION = 1.3
"""Standard errors by which a trial has to be ahead of MIN_GAIN; to be behind, one is enough."""

FIRST_RUN, MAX_RUN = 64, 256
"""Steps with look-ahead between two controls without it; doubled after each."""

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
Trial = Generator[Stretch, Window, bool]


class GainController:
    """Looks ahead where that is faster, and spends next to nothing on finding out.

    `reach` is what holds now, 0 for none, and unless `is_asking` the predictor need not be asked at
    all; `is_promising` until something speaks against it. After a few steps two ask for forecasts
    without reading ahead. Where the stall could not pay for them, nothing is tried; where it would
    twice over, a trial begins at once; in doubt it waits until it costs no more than REGRET of all
    time so far. A trial compares windows with look-ahead with those without before and after them,
    so that drift cancels, until the interval of their log ratio leaves MIN_GAIN. Where it paid,
    look-ahead goes on, with ever rarer controls. Where not, it rests, ever longer, and the next
    trial looks less far ahead, in case it was the reads and not the forecasts that cost.
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
        coverage = self._num_foreseen / self._num_absent if self._num_absent else None
        return Window(wall_s, stall_s, forecast_s, coverage)

    def _begin(self, stretch: Stretch) -> None:
        self._num_left, self.reach, self.is_asking = stretch
        self._num_counted = self._num_left - (2 if self.reach else 1)
        self._steps.clear()
        self._num_absent = self._num_foreseen = 0

    def _course(self) -> Stretches:
        rest = yield Stretch(FIRST_STEPS)
        pause, reach = FIRST_PAUSE, self._max_reach
        while True:
            asked = yield Stretch(ASKED_STEPS, is_asking=True)
            self._outlook.see(asked)
            self._credit_s -= ASKED_STEPS * asked.forecast_s
            verdict = self._outlook.verdict(rest)
            num_rested = 0
            while not self._may_try(verdict, rest) and num_rested < pause:
                rest = yield Stretch(REST_STEPS)
                # In doubt it is credit that is waited for, and asking again would only cost some.
                num_rested += REST_STEPS if verdict is Verdict.NO else 0
                verdict = self._outlook.verdict(rest)
            self.is_promising = verdict is not Verdict.NO
            if self._may_try(verdict, rest):
                if (yield from self._trial(reach, rest)):
                    self._outlook = Outlook()
                    yield from self._exploit(reach)
                    pause, reach = FIRST_PAUSE, self._max_reach
                else:
                    reach = reach // 4 or self._max_reach
                rest = yield from self._rest(pause)
            self._outlook.forget()
            pause = min(2 * pause, MAX_PAUSE)

    def _rest(self, steps: int) -> Rest:
        rest = yield Stretch(steps)
        return rest

    def _may_try(self, verdict: Verdict, rest: Window) -> bool:
        if verdict is Verdict.DOUBT:
            return self._credit_s >= ON_STEPS * (self._outlook.cost_s + WASTE * rest.wall_s)
        return verdict is Verdict.YES

    def _trial(self, reach: int, before: Window) -> Trial:
        logs: list[float] = []
        while True:
            on = yield Stretch(ON_STEPS, reach, True)
            after = yield Stretch(OFF_STEPS)
            self._credit_s -= ON_STEPS * max(0.0, on.wall_s - after.wall_s)
            logs.append((_log_ratio(before, on) + _log_ratio(after, on)) / 2.0)
            before = after
            pays = _pays(logs)
            if pays is None and self._credit_s < 0.0 and fmean(logs) < 0.0:
                pays = False
            if pays is not None:
                self.is_promising = pays
                if not pays:
                    self._outlook.learn(on=on, off=after)
                return pays

    def _exploit(self, reach: int) -> Stretches:
        logs: deque[float] = deque(maxlen=4)
        num_steps = FIRST_RUN
        while len(logs) < 2 or fmean(logs) > 0.0:
            before = yield Stretch(num_steps, reach, True)
            off = yield Stretch(OFF_STEPS)
            after = yield Stretch(ON_STEPS, reach, True)
            logs.append((_log_ratio(off, before) + _log_ratio(off, after)) / 2.0)
            num_steps = min(2 * num_steps, MAX_RUN)
            if logs[-1] < -UNKNOWN_SPREAD:
                return


def _log_ratio(off: Window, on: Window) -> float:
    """Above 0 where look-ahead is faster."""
    return math.log(max(off.wall_s, 1e-9) / max(on.wall_s, 1e-9))


def _pays(logs: list[float]) -> bool | None:
    """Whether look-ahead pays, None while that is open."""
    if len(logs) < MIN_PAIRS:
        return False if fmean(logs) < -HOPELESS else None
    spread = max(MIN_SPREAD, stdev(logs))
    mean, error = fmean(logs), spread / math.sqrt(len(logs))
    # Going on where it costs is dearer than resting where it pays: there is always a next trial.
    if mean - CAUTION * error > MIN_GAIN:
        return True
    if mean + error < MIN_GAIN or len(logs) == MAX_PAIRS:
        return False
    return None

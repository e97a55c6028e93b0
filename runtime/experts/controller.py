"""Whether looking ahead pays, by the clock: the controller behind `auto`.

Sees the durations of steps only, so that whatever forecasts and reads ahead cost counts, the
predictor's own time included. Knows neither forecasts nor experts.
"""

import math
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from itertools import cycle
from statistics import fmean, median, stdev

FIRST_STEPS = 4
"""Steps before the first trial: what a cold cache takes says little."""

ON_STEPS, OFF_STEPS = 6, 4
"""Length of a window. Its first steps are not counted: of one with look-ahead two, in which reads
get under way and the predictor sees what it missed; of one without it one."""

MAX_PAIRS = 6

UNKNOWN_SPREAD, MIN_SPREAD = 0.1, 0.02
"""Standard deviation of the log ratio of two windows: before two pairs are known, and at least."""

MIN_GAIN = 0.01

CAUTION = 1.3
"""Standard errors by which a trial has to be ahead of MIN_GAIN; to be behind, one is enough."""

FIRST_RUN, MAX_RUN = 32, 256
"""Steps with look-ahead between two controls without it; doubled after each."""

FIRST_PAUSE, MAX_PAUSE = 64, 4096
"""Steps without look-ahead between two trials; doubled after each that failed."""

MIN_STALL_SHARE = 0.02

DOUBT = 0.5
"""Share of a known overhead that is believed after a pause that all of it has prolonged: one trial
may have been unlucky."""

MAX_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class Window:
    """Medians over a window's counted steps, seconds."""

    wall_s: float
    stall_s: float

    @property
    def busy_s(self) -> float:
        """What a step takes apart from waiting for experts."""
        return max(0.0, self.wall_s - self.stall_s)


# Yields (reach, steps) of the next window, is sent what it measured.
Windows = Generator[tuple[int, int], Window, None]
Trial = Generator[tuple[int, int], Window, bool]


class GainController:
    """Alternates short windows with and without look-ahead, and keeps what is faster.

    `reach` is what holds now, 0 for none: then the predictor need not be asked at all;
    `is_promising` until a trial fails, and again after one that does not. A trial
    pairs windows, in both orders so that drift cancels, until the interval of their log ratio
    leaves `MIN_GAIN`. Where it paid, look-ahead goes on, with ever rarer controls. Where not, it
    rests, ever longer, and longer still where no stall is worth what the trial has cost.
    The next trial looks less far ahead, in case it was the reads and not the forecasts that cost.
    """

    def __init__(self, max_reach: int) -> None:
        self.reach = 0
        self.is_promising = True
        self._max_reach = max_reach
        # What the last trial that failed cost in a step apart from stalls, and what of it is sure.
        self._overhead_s = self._doubted_s = 0.0
        self._walls: deque[float] = deque(maxlen=MAX_REMEMBERED)
        self._stalls: deque[float] = deque(maxlen=MAX_REMEMBERED)
        self._run = self._course()
        self._begin(next(self._run))

    def end_step(self, *, wall_s: float, stall_s: float) -> None:
        """One decode step took `wall_s`, in `stall_s` of which compute waited for experts."""
        self._num_left -= 1
        if self._num_left < self._num_counted:
            self._walls.append(wall_s)
            self._stalls.append(stall_s)
        if not self._num_left:
            self._begin(self._run.send(Window(median(self._walls), median(self._stalls))))

    def _begin(self, window: tuple[int, int]) -> None:
        self.reach, self._num_left = window
        self._num_counted = self._num_left - (2 if self.reach else 1)
        self._walls.clear()
        self._stalls.clear()

    def _course(self) -> Windows:
        rest = yield 0, FIRST_STEPS
        pause, reach = FIRST_PAUSE, self._max_reach
        while True:
            if not self._may_pay(rest):
                self._overhead_s = min(self._overhead_s, self._doubted_s)
                rest = yield 0, pause
                continue
            if (yield from self._trial(reach)):
                yield from self._exploit(reach)
                pause, reach = FIRST_PAUSE, self._max_reach
            else:
                reach = reach // 4 or self._max_reach
            rest = yield 0, pause
            pause = min(2 * pause, MAX_PAUSE)

    def _may_pay(self, rest: Window) -> bool:
        if rest.stall_s <= MIN_STALL_SHARE * rest.wall_s:
            return False
        return rest.stall_s > self._overhead_s

    def _trial(self, reach: int) -> Trial:
        logs: list[float] = []
        for is_on_first in cycle((True, False)):
            if is_on_first:
                on = yield reach, ON_STEPS
                off = yield 0, OFF_STEPS
            else:
                off = yield 0, OFF_STEPS
                on = yield reach, ON_STEPS
            logs.append(_log_ratio(off, on))
            pays = _verdict(logs)
            if pays is not None:
                self.is_promising = pays
                self._overhead_s = 0.0 if pays else max(0.0, on.busy_s - off.busy_s)
                self._doubted_s = DOUBT * self._overhead_s
                return pays
        return False

    def _exploit(self, reach: int) -> Windows:
        logs: deque[float] = deque(maxlen=4)
        num_steps = FIRST_RUN
        while len(logs) < 2 or fmean(logs) > 0.0:
            before = yield reach, num_steps
            off = yield 0, OFF_STEPS
            after = yield reach, ON_STEPS
            logs.append((_log_ratio(off, before) + _log_ratio(off, after)) / 2.0)
            num_steps = min(2 * num_steps, MAX_RUN)
            if logs[-1] < -UNKNOWN_SPREAD:
                return


def _log_ratio(off: Window, on: Window) -> float:
    """Above 0 where look-ahead is faster."""
    return math.log(max(off.wall_s, 1e-9) / max(on.wall_s, 1e-9))


def _verdict(logs: list[float]) -> bool | None:
    """Whether look-ahead pays, None while that is open."""
    spread = max(MIN_SPREAD, stdev(logs)) if len(logs) > 1 else UNKNOWN_SPREAD
    mean, error = fmean(logs), spread / math.sqrt(len(logs))
    # Going on where it costs is dearer than resting where it pays: there is always a next trial.
    if mean - CAUTION * error > MIN_GAIN:
        return True
    if mean + error < MIN_GAIN or len(logs) == MAX_PAIRS:
        return False
    return None

"""How far ahead prefetching may look, from what it brought: the controller behind `auto`.

Sees counts and stalls only; knows neither forecasts nor experts.
"""

from .cache import CacheCounters

WINDOW_STEPS = 16

FIRST_INTERVAL, MAX_INTERVAL = 4, 32
"""Windows between two controls, which run without prefetching; doubled after each control."""

FIRST_PAUSE, MAX_PAUSE = 2, 64

MIN_GAIN = 0.03
"""Share of the control's stall that must be saved: windows of one workload differ by as much."""

MIN_ENDED = 8
POOR_PRECISION = 0.3
GOOD_PRECISION = 0.5


class ReachController:
    """Quarters the reach after a poor window, doubles it after a good one, down to none at all.

    Poor: too few of the prefetches that ended were used, or compute did not stall less than in the
    control windows. Precision alone does not tell: what is fetched by mistake may be used later by
    chance. At 0 it pauses, twice as long each time, then tries a quarter of the reach. The first
    window is never a control, since its cache is cold.
    """

    def __init__(self, max_reach: int, counters: CacheCounters) -> None:
        self.reach = max_reach
        self._max_reach = max_reach
        self._counters = counters
        self._level = max_reach
        self._num_steps = 0
        self._stall_s = 0.0
        self._used = counters.prefetch_used
        self._wasted = counters.prefetch_wasted
        self._control_stall_s: float | None = None
        self._interval = FIRST_INTERVAL
        self._until_control = 1
        self._pause = FIRST_PAUSE
        self._until_retry = 0

    def end_step(self, stall_s: float) -> None:
        """Count one decode step; a window's last one sets `reach` for the next window."""
        self._num_steps += 1
        self._stall_s += stall_s
        if self._num_steps < WINDOW_STEPS:
            return
        stall_s, self._num_steps, self._stall_s = self._stall_s / WINDOW_STEPS, 0, 0.0
        used = self._counters.prefetch_used - self._used
        ended = used + self._counters.prefetch_wasted - self._wasted
        self._used, self._wasted = self._counters.prefetch_used, self._counters.prefetch_wasted
        if self.reach:
            self._judge(stall_s, used / ended if ended >= MIN_ENDED else None)
            self._until_control -= 1
        else:
            self._learn(stall_s)
        self.reach = self._level if self._until_control else 0

    def _judge(self, stall_s: float, precision: float | None) -> None:
        pays = self._control_stall_s is None or stall_s <= self._control_stall_s * (1.0 - MIN_GAIN)
        if not pays or (precision is not None and precision < POOR_PRECISION):
            self._level //= 4
            if not self._level:
                self._until_retry = self._pause
                self._pause = min(2 * self._pause, MAX_PAUSE)
        elif precision is not None and precision > GOOD_PRECISION:
            self._level = min(2 * self._level, self._max_reach)
            self._pause = FIRST_PAUSE

    def _learn(self, stall_s: float) -> None:
        """A window without prefetching: a control, or one of a pause."""
        known = stall_s if self._control_stall_s is None else self._control_stall_s
        self._control_stall_s = (known + stall_s) / 2.0
        if self._until_retry:
            self._until_retry -= 1
            if not self._until_retry:
                self._level = max(1, self._max_reach // 4)
                self._interval = self._until_control = FIRST_INTERVAL
        else:
            self._until_control = self._interval
            self._interval = min(2 * self._interval, MAX_INTERVAL)

"""How far ahead prefetching may look, from what it brought: the controller behind `auto`.

Sees counts and stalls only; knows neither forecasts nor experts.
"""

from .cache import CacheCounters

WINDOW_STEPS = 16
CONTROL_EVERY = 24
"""One window in so many runs without prefetching, to know what it is compared with."""

MIN_ENDED = 8
POOR_PRECISION = 0.3
GOOD_PRECISION = 0.6
MAX_STALL_RATIO = 1.1
FIRST_PAUSE, MAX_PAUSE = 2, 64


class ReachController:
    """Halves the reach after a poor window, doubles it after a good one, down to none at all.

    Poor: too few of the prefetches that ended were used, or compute stalled for longer than in
    the last window without prefetching. At 0 it pauses, twice as long each time, then tries a
    quarter of the reach. The first window is never the control: its cache is cold.
    """

    def __init__(self, max_reach: int, counters: CacheCounters) -> None:
        self.reach = max_reach
        self._max_reach = max_reach
        self._counters = counters
        self._level = max_reach
        self._num_windows = 0
        self._num_steps = 0
        self._stall_s = 0.0
        self._used = counters.prefetch_used
        self._wasted = counters.prefetch_wasted
        self._control_stall_s: float | None = None
        self._pause = 0
        self._next_pause = FIRST_PAUSE

    def end_step(self, stall_s: float) -> None:
        """Count one step; at the end of a window, judge it and set `reach` for the next."""
        self._num_steps += 1
        self._stall_s += stall_s
        if self._num_steps == WINDOW_STEPS:
            self._judge(self._stall_s / WINDOW_STEPS)
            self._num_windows += 1
            is_control = self._num_windows % CONTROL_EVERY == 1
            self.reach = 0 if is_control else self._level
            self._num_steps, self._stall_s = 0, 0.0

    def _judge(self, stall_s: float) -> None:
        used = self._counters.prefetch_used - self._used
        wasted = self._counters.prefetch_wasted - self._wasted
        self._used, self._wasted = self._counters.prefetch_used, self._counters.prefetch_wasted
        if self._pause:
            self._pause -= 1
            if not self._pause:
                self._level = max(1, self._max_reach // 4)
        if not self.reach:
            self._control_stall_s = stall_s
            return
        precision = used / (used + wasted) if used + wasted >= MIN_ENDED else None
        is_slower = (
            self._control_stall_s is not None and stall_s > self._control_stall_s * MAX_STALL_RATIO
        )
        if is_slower or (precision is not None and precision < POOR_PRECISION):
            self._level //= 2
            if not self._level:
                self._pause = self._next_pause
                self._next_pause = min(2 * self._next_pause, MAX_PAUSE)
        elif precision is not None and precision > GOOD_PRECISION:
            self._level = min(2 * self._level, self._max_reach)
            self._next_pause = FIRST_PAUSE

"""Seconds that this process was awake for: time-outs by it survive a machine that was stopped."""

import time


class AwakeClock:
    """A clock that its owner moves on with `tick`; a long gap between ticks counts as a short one.

    A process that was stopped (SIGSTOP, a suspended laptop, a debugger) wakes to peers that had no
    chance to answer: what waits for them must not give up at once. Monotonic, so that changes of
    the time of day do nothing. One thread ticks, any may read.
    """

    def __init__(self, *, max_gap_s: float = 1.0) -> None:
        self.now_s = 0.0
        self._max_gap_s = max_gap_s
        self._last_s = time.monotonic()

    def tick(self) -> None:
        """Move on by the time since the last tick, at most `max_gap_s`."""
        now = time.monotonic()
        self.now_s += min(now - self._last_s, self._max_gap_s)
        self._last_s = now

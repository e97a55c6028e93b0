"""What a prefetch in vain is taken to cost, from how many there were.

Counts only; knows neither bandwidth nor forecasts.
"""

from .cache import CacheCounters

FIRST_PRICE, MIN_PRICE, MAX_PRICE = 0.42, 0.15, 8.0
"""In on-demand reads saved: at 0.42 an expert of probability 0.3 is just worth its read."""

WINDOW_STEPS = 8

MAX_WASTE = 0.1
"""Bytes in vain that are taken into the bargain, as a share of those that were needed."""


class ReadPrice:
    """A price that rises while more than MAX_WASTE of what is read is read in vain, and falls.

    This bounds the bytes that look-ahead adds, whatever the link: forecasts that promise more than
    they keep become dear.
    """

    def __init__(self, counters: CacheCounters) -> None:
        self.price = FIRST_PRICE
        self._counters = counters
        self._num_steps = 0
        self._num_needed = 0.0
        self._used = counters.prefetch_used
        self._wasted = counters.prefetch_wasted

    @property
    def least_probability(self) -> float:
        """Below it no prefetch pays, were it done in time and its slot free."""
        return self.price / (1.0 + self.price)

    def end_step(self, num_on_demand: float) -> None:
        """A step that looked ahead and read this many experts on demand all the same; some such
        steps later the price follows.
        """
        self._num_steps += 1
        self._num_needed += num_on_demand
        if self._num_steps < WINDOW_STEPS:
            return
        used, wasted = self._counters.prefetch_used, self._counters.prefetch_wasted
        num_needed = self._num_needed + used - self._used
        num_wasted = wasted - self._wasted
        self._used, self._wasted = used, wasted
        self._num_steps, self._num_needed = 0, 0.0
        if num_wasted > MAX_WASTE * num_needed:
            self.price = min(1.5 * self.price, MAX_PRICE)
        elif num_wasted < 0.7 * MAX_WASTE * num_needed:
            self.price = max(self.price / 1.25, MIN_PRICE)

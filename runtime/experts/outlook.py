"""What looking ahead would gain in a step, estimated before it is tried: stall against cost.

Numbers only; knows neither forecasts nor experts. `controller` acts on it.
"""

from dataclasses import dataclass
from enum import Enum

MIN_STALL_SHARE = 0.02
"""With less stall than this there is nothing to gain, whatever forecasts cost."""

MIN_GAIN, CLEAR_GAIN = 0.01, 0.05
"""Of a step: what must at least be gained to be worth having, and what is gain beyond doubt."""

MOST_HIDDEN, LEAST_HIDDEN = 1.15, 0.5
"""Of the stall for which forecasts spoke in the steps that only asked: reads that come late hide
less, and a forecast of the next layer may come after the one that was counted."""

ENOUGH_ABSENT = 8
"""Absent experts from which the share that is foreseen can be told: of fewer, those that are
lacking may have been foreseen or not. One step with two misses, both unforeseen, says little."""

LEAST_COST, MOST_COST = 0.75, 1.5
"""Of the time that forecasts took there; reads ahead take some of their own."""

FORGETTING = 0.5
"""Of what a trial has shown, after a pause that it has prolonged: it may have been unlucky."""


class Verdict(Enum):
    """Whether look-ahead pays, as far as can be told without trying."""

    NO = "no"
    DOUBT = "doubt"
    YES = "yes"


@dataclass(frozen=True, slots=True)
class Window:
    """Medians over a window's counted steps, seconds.

    `forecast_s` is what asking took; of `num_absent` experts that held no slot forecasts had spoken
    of `num_foreseen` in time, both sums. `error` is the standard error of the
    median of log `wall_s`, by the spread of the steps; 0 of a single one.
    """

    wall_s: float
    stall_s: float
    forecast_s: float = 0.0
    num_absent: int = 0
    num_foreseen: int = 0
    error: float = 0.0

    @property
    def busy_s(self) -> float:
        """What a step takes apart from waiting for experts."""
        return max(0.0, self.wall_s - self.stall_s)


class Outlook:
    """Bounds of the gain: stall that reads could hide behind compute, less what asking costs.

    Both are learned from steps that only asked (`see`), then from trials (`learn`), which count for
    more until `forget`.
    """

    def __init__(self) -> None:
        self.cost_s = self._asked_s = 0.0
        # At least and at most, of the experts that are absent.
        self.coverage = self._asked_coverage = 0.0, 1.0
        # A trial has measured the cost whole, so no allowance is made for what asking leaves out.
        self._is_tried = False

    def see(self, asked: Window) -> None:
        """Steps that asked for forecasts and read nothing ahead."""
        self._asked_s = asked.forecast_s
        count = max(asked.num_absent, ENOUGH_ABSENT)
        unknown = count - asked.num_absent
        least, most = asked.num_foreseen / count, (asked.num_foreseen + unknown) / count
        self._asked_coverage = least, most
        if not self._is_tried:
            self.cost_s, self.coverage = self._asked_s, self._asked_coverage

    def learn(self, *, on: Window, off: Window) -> None:
        """A trial has failed with these windows: what it cost and what it hid is known now."""
        self._is_tried = True
        self.cost_s = max(0.0, on.busy_s - off.busy_s)
        hidden = 1.0 - on.stall_s / off.stall_s if off.stall_s else 0.0
        self.coverage = max(0.0, hidden), max(0.0, hidden)

    def forget(self) -> None:
        """A pause has gone by for which the last trial is to blame."""
        self.cost_s += FORGETTING * (min(self.cost_s, self._asked_s) - self.cost_s)
        least, most = (
            tried + FORGETTING * max(0.0, asked - tried)
            for tried, asked in zip(self.coverage, self._asked_coverage, strict=True)
        )
        self.coverage = least, most

    @staticmethod
    def has_stall(rest: Window) -> bool:
        """There is something to gain in such steps, whatever forecasts cost."""
        return rest.stall_s > MIN_STALL_SHARE * rest.wall_s

    def verdict(self, rest: Window) -> Verdict:
        """By steps without look-ahead."""
        if not self.has_stall(rest):
            return Verdict.NO
        foreseen_least, foreseen_most = self.coverage
        most = min(rest.busy_s, min(1.0, MOST_HIDDEN * foreseen_most) * rest.stall_s)
        if most - LEAST_COST * self.cost_s < MIN_GAIN * rest.wall_s:
            return Verdict.NO
        least = min(rest.busy_s, LEAST_HIDDEN * foreseen_least * rest.stall_s)
        is_clear = least - MOST_COST * self.cost_s >= CLEAR_GAIN * rest.wall_s
        return Verdict.YES if is_clear and not self._is_tried else Verdict.DOUBT

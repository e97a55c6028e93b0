"""ReachController: goes on while prefetching pays, stops when it does not, and tries again."""

import pytest

from outrider.runtime.experts.cache import CacheCounters
from outrider.runtime.experts.controller import WINDOW_STEPS, ReachController


class Course:
    """Feeds a controller with steps of one kind and keeps what reach it allowed in each."""

    def __init__(self, max_reach: int = 16) -> None:
        self.counters = CacheCounters()
        self.controller = ReachController(max_reach, self.counters)

    def run(self, windows: int, *, used: int, wasted: int, stall_s: float, idle_s: float) -> int:
        """Steps with a reach above 0; without prefetching a step stalls for `idle_s`."""
        num_steps = 0
        for _ in range(windows * WINDOW_STEPS):
            num_steps += self.controller.reach > 0
            if self.controller.reach:
                self.counters.prefetch_used += used
                self.counters.prefetch_wasted += wasted
            self.controller.end_step(stall_s if self.controller.reach else idle_s)
        return num_steps


def test_useful_prefetching_runs_at_full_reach_nearly_always() -> None:
    course = Course()
    num_steps = course.run(200, used=9, wasted=1, stall_s=0.1, idle_s=0.4)
    assert num_steps > 0.94 * 200 * WINDOW_STEPS
    assert course.controller.reach in (0, 16)


def test_nothing_to_gain_is_no_reason_to_turn_prefetching_off() -> None:
    course = Course()
    assert course.run(50, used=0, wasted=0, stall_s=0.0, idle_s=0.0) > 0.8 * 50 * WINDOW_STEPS


@pytest.mark.parametrize(
    ("used", "wasted", "stall_s"),
    [(1, 9, 0.1), (9, 1, 0.8), (9, 1, 0.4)],
    ids=["wasted", "slower", "no-gain"],
)
def test_harmful_prefetching_is_turned_down_to_a_rare_attempt(
    used: int, wasted: int, stall_s: float
) -> None:
    course = Course()
    course.run(20, used=used, wasted=wasted, stall_s=stall_s, idle_s=0.4)
    late = course.run(400, used=used, wasted=wasted, stall_s=stall_s, idle_s=0.4)
    assert late < 0.1 * 400 * WINDOW_STEPS
    assert late > 0, "it is tried again now and then"


def test_prefetching_comes_back_when_it_pays_again() -> None:
    course = Course()
    course.run(60, used=1, wasted=9, stall_s=0.1, idle_s=0.4)
    course.run(2 * 64, used=9, wasted=1, stall_s=0.1, idle_s=0.4)
    assert course.run(10, used=9, wasted=1, stall_s=0.1, idle_s=0.4) >= 8 * WINDOW_STEPS
    assert course.controller.reach in (0, 16)

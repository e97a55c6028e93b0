"""GainController: keeps what is faster by the clock, and loses next to nothing finding out."""

import random
from itertools import pairwise
from statistics import fmean

import pytest

from outrider.runtime.experts.controller import FIRST_PAUSE, FIRST_STEPS, GainController


class Course:
    """Steps of made-up length; remembers how long they took, and which had look-ahead."""

    def __init__(self, max_reach: int = 16, *, seed: int = 0, noise: float = 0.0) -> None:
        self.controller = GainController(max_reach)
        self.random = random.Random(seed)
        self.noise = noise
        self.reaches: list[int] = []
        self.wall_s = 0.0

    def run(self, steps: int, *, on_s: float, off_s: float, stall_s: float = 0.5) -> list[int]:
        """`on_s` and `off_s` are a step's length; `stall_s` the stall of one without look-ahead."""
        for _ in range(steps):
            reach = self.controller.reach
            factor = self.random.lognormvariate(0.0, self.noise) if self.noise else 1.0
            wall_s = (on_s if reach else off_s) * factor
            stalled_s = max(0.0, stall_s - 0.3) if reach else stall_s
            self.reaches.append(reach)
            self.wall_s += wall_s
            self.controller.end_step(wall_s=wall_s, stall_s=stalled_s * factor)
        return self.reaches[-steps:]


def test_look_ahead_that_pays_runs_nearly_always() -> None:
    course = Course()
    course.run(200, on_s=0.8, off_s=1.0)
    late = course.run(2000, on_s=0.8, off_s=1.0)
    assert sum(reach > 0 for reach in late) > 0.95 * len(late)
    assert set(late) == {0, 16}


@pytest.mark.parametrize("on_s", [1.02, 1.1, 1.3, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_look_ahead_that_costs_is_found_out_at_little_cost(on_s: float, seed: int) -> None:
    course = Course(seed=seed, noise=0.05)
    course.run(1000, on_s=on_s, off_s=1.0)
    without = Course(seed=seed, noise=0.05)
    without.run(1000, on_s=1.0, off_s=1.0)
    assert course.wall_s < 1.02 * without.wall_s
    assert any(course.reaches), "it was tried"


@pytest.mark.parametrize("gain", [-0.2, -0.05, 0.0, 0.1, 0.25])
def test_on_a_noisy_machine_it_is_never_much_behind_the_better_of_both(gain: float) -> None:
    """A single course may be unlucky, so many: they fix the mean to a quarter of a percent."""
    ratios = []
    for seed in range(120):
        course = Course(seed=seed, noise=0.2)
        course.run(1500, on_s=1.0 - gain, off_s=1.0)
        off = Course(seed=seed, noise=0.2)
        off.run(1500, on_s=1.0, off_s=1.0)
        ratios.append(off.wall_s / course.wall_s)
    assert fmean(ratios) > (1.0 + 0.8 * gain if gain > 0.0 else 0.985)
    assert min(ratios) > 0.95


def test_where_nothing_stalls_nothing_is_tried() -> None:
    course = Course()
    assert not any(course.run(1000, on_s=1.0, off_s=1.0, stall_s=0.0))


def test_too_little_stall_for_what_looking_ahead_costs_is_not_tried_again() -> None:
    course = Course()
    course.run(300, on_s=1.5, off_s=1.0)
    assert any(course.reaches)
    assert not any(course.run(2000, on_s=1.1, off_s=1.0, stall_s=0.05))


def test_look_ahead_comes_back_when_it_pays_again() -> None:
    course = Course()
    course.run(700, on_s=1.3, off_s=1.0)
    course.run(1500, on_s=0.7, off_s=1.0)
    late = course.run(500, on_s=0.7, off_s=1.0)
    assert sum(reach > 0 for reach in late) > 0.9 * len(late)


def test_look_ahead_that_stops_paying_is_turned_off() -> None:
    course = Course()
    course.run(500, on_s=0.7, off_s=1.0)
    course.run(600, on_s=1.2, off_s=1.0)
    late = course.run(500, on_s=1.2, off_s=1.0)
    assert sum(reach > 0 for reach in late) < 0.1 * len(late)


def test_trials_grow_rarer() -> None:
    course = Course()
    course.run(6000, on_s=1.3, off_s=1.0)
    starts = [
        step
        for step in range(1, 6000)
        if course.reaches[step] and not any(course.reaches[max(0, step - 20) : step])
    ]
    pauses = [after - before for before, after in pairwise(starts)]
    assert starts[0] == FIRST_STEPS
    assert pauses[0] >= FIRST_PAUSE
    assert all(after > 1.5 * before for before, after in pairwise(pauses))


def test_it_looks_less_far_after_a_failure_and_says_that_it_promised() -> None:
    course = Course(max_reach=32)
    assert course.controller.is_promising
    course.run(60, on_s=1.5, off_s=1.0)
    assert not course.controller.is_promising
    course.run(1000, on_s=1.5, off_s=1.0)
    assert {0, 32, 8, 2} <= set(course.reaches)


def test_a_slow_drift_is_not_taken_for_a_gain() -> None:
    """A cache that warms up makes each step a little faster than the one before."""
    course = Course()
    step_s = 2.0
    for _ in range(300):
        course.run(1, on_s=step_s * 1.02, off_s=step_s)
        step_s = 1.0 + (step_s - 1.0) * 0.97
    assert not any(course.reaches[-30:])

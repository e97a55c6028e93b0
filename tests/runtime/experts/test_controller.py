"""GainController: keeps what is faster, and loses next to nothing finding out. Made-up courses."""

import random
from itertools import pairwise
from statistics import fmean

import pytest
import recorded_steps

from outrider.runtime.experts.controller import (
    ASKED_STEPS,
    FIRST_PAUSE,
    FIRST_STEPS,
    ON_STEPS,
    REGRET,
    GainController,
)


class Course:
    """Steps of made-up length; remembers how long they took, and which had look-ahead.

    `forecast_s` is what asking takes, `coverage` the share of absent experts that is forecast.
    """

    def __init__(
        self,
        max_reach: int = 16,
        *,
        seed: int = 0,
        noise: float = 0.0,
        forecast_s: float = 0.02,
        coverage: float = 0.8,
        absent: int = 10,
    ) -> None:
        self.controller = GainController(max_reach)
        self.random = random.Random(seed)
        self.noise = noise
        self.forecast_s = forecast_s
        self.coverage, self.absent = coverage, absent
        self.chance = random.Random(seed)
        self.reaches: list[int] = []
        self.asked = 0
        self.wall_s = 0.0

    def run(self, steps: int, *, on_s: float, off_s: float, stall_s: float = 0.5) -> list[int]:
        """`on_s` and `off_s` are a step's length; `stall_s` the stall of one without look-ahead."""
        for _ in range(steps):
            reach, is_asking = self.controller.reach, self.controller.is_asking
            self.step(is_asking, (on_s if reach else off_s), stall_s)
        return self.reaches[-steps:]

    def step(self, is_asking: bool, wall_s: float, stall_s: float) -> None:
        reach = self.controller.reach
        factor = self.random.lognormvariate(0.0, self.noise) if self.noise else 1.0
        if is_asking and not reach:
            wall_s += self.forecast_s
        if reach:
            stall_s = max(0.0, stall_s - 0.3)
        self.reaches.append(reach)
        self.asked += is_asking
        self.wall_s += wall_s * factor
        self.controller.end_step(
            wall_s=wall_s * factor,
            stall_s=stall_s * factor,
            forecast_s=self.forecast_s if is_asking else 0.0,
            num_absent=self.absent,
            num_foreseen=self._foreseen(),
        )

    def _foreseen(self) -> int:
        if self.absent == 10:
            return round(10 * self.coverage)
        return sum(self.chance.random() < self.coverage for _ in range(self.absent))


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
    course = Course(forecast_s=0.2)
    course.run(500, on_s=1.5, off_s=1.0)
    assert any(course.reaches)
    assert not any(course.run(2000, on_s=1.1, off_s=1.0, stall_s=0.05))


@pytest.mark.parametrize(
    ("forecast_s", "stall_s", "coverage"),
    [(0.3, 0.2, 1.0), (0.02, 0.3, 0.0), (0.01, 0.015, 1.0)],
    ids=["dear", "blind", "no stall"],
)
def test_what_an_estimate_rules_out_is_never_tried(
    forecast_s: float, stall_s: float, coverage: float
) -> None:
    """A forecast that costs more than the stall it could hide, as on a very small model."""
    course = Course(forecast_s=forecast_s, coverage=coverage)
    course.run(3000, on_s=1.0 + forecast_s, off_s=1.0, stall_s=stall_s)
    assert not any(course.reaches)
    assert 0 < course.asked <= 20, "asked again now and then, ever more rarely"
    assert course.wall_s < 3000 * 1.003


def test_a_clear_gain_is_had_within_the_first_tokens() -> None:
    """A short answer from a model whose stalls are long: nothing is left to a later trial."""
    course = Course()
    course.run(60, on_s=0.6, off_s=1.0, stall_s=0.6)
    assert sum(reach > 0 for reach in course.reaches) > 35
    assert course.reaches[: FIRST_STEPS + ASKED_STEPS] == [0] * (FIRST_STEPS + ASKED_STEPS)


@pytest.mark.parametrize("tokens", [24, 64, 150])
@pytest.mark.parametrize("on_s", [1.0, 1.2, 1.5])
def test_in_doubt_a_short_run_is_no_place_for_a_trial(tokens: int, on_s: float) -> None:
    course = Course(forecast_s=0.1)
    course.run(tokens, on_s=on_s, off_s=1.0, stall_s=0.2)
    assert not any(course.reaches)
    assert course.wall_s <= tokens + ASKED_STEPS * 0.1 * 2 + 1e-9


@pytest.mark.parametrize("on_s", [1.02, 1.1, 1.3, 2.0])
def test_trials_in_doubt_keep_their_share_of_the_time(on_s: float) -> None:
    course = Course(forecast_s=0.1, noise=0.03)
    for _ in range(30):
        course.run(100, on_s=on_s, off_s=1.0, stall_s=0.25)
        lost = course.wall_s / len(course.reaches) - 1.0
        # One window may turn out dearer than it was taken to be.
        assert lost < REGRET + ON_STEPS * (on_s - 1.0) / len(course.reaches) + 0.01
    assert any(course.reaches)


@pytest.mark.parametrize(("absent", "least"), [(1, 0.8), (2, 0.9), (4, 0.9)])
def test_few_absent_experts_are_no_evidence_that_none_is_foreseen(
    absent: int, least: float
) -> None:
    """At budgets where a token lacks one or two, the step that was asked may foresee none."""
    shares = []
    for seed in range(40):
        course = Course(seed=seed, coverage=0.5, absent=absent)
        course.run(100, on_s=0.8, off_s=1.0)
        shares.append(fmean(reach > 0 for reach in course.run(300, on_s=0.8, off_s=1.0)))
    assert fmean(shares) > least
    assert min(shares) > 0.5


def test_in_doubt_a_gain_is_found_in_the_end() -> None:
    course = Course(forecast_s=0.1)
    course.run(1000, on_s=0.9, off_s=1.0, stall_s=0.3)
    late = course.run(500, on_s=0.9, off_s=1.0, stall_s=0.3)
    assert sum(reach > 0 for reach in late) > 0.85 * len(late)


def test_a_cache_that_warms_up_during_the_trial_does_not_count_against_it() -> None:
    """With look-ahead comes first, and its steps are slower for being the colder ones."""
    course, length = Course(), 6.0
    for _ in range(70):
        course.run(1, on_s=0.8 * length, off_s=length, stall_s=0.6 * length)
        length = 1.0 + (length - 1.0) * 0.9
    assert sum(reach > 0 for reach in course.reaches[-40:]) > 30


def test_what_was_learned_holds_for_the_next_request() -> None:
    """Steps are all that it sees, so a request is no beginning."""
    course = Course()
    for _ in range(10):
        course.run(24, on_s=0.7, off_s=1.0)
    assert sum(reach > 0 for reach in course.reaches[24:]) > 0.85 * len(course.reaches[24:])


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
    assert starts[0] == FIRST_STEPS + ASKED_STEPS
    assert pauses[0] >= FIRST_PAUSE
    assert all(after > 1.5 * before for before, after in pairwise(pauses[-3:]))
    assert len(starts) < 10


def test_it_looks_less_far_after_a_failure_and_says_that_it_promised() -> None:
    course = Course(max_reach=32)
    assert course.controller.is_promising
    course.run(60, on_s=1.5, off_s=1.0)
    assert not course.controller.is_promising
    course.run(3000, on_s=1.5, off_s=1.0)
    assert {0, 32, 8, 2} <= set(course.reaches)


def test_a_slow_drift_is_not_taken_for_a_gain() -> None:
    """A cache that warms up makes each step a little faster than the one before."""
    course = Course()
    step_s = 2.0
    for _ in range(300):
        course.run(1, on_s=step_s * 1.02, off_s=step_s)
        step_s = 1.0 + (step_s - 1.0) * 0.97
    assert sum(reach > 0 for reach in course.reaches) < 45


# What asking took in the recorded runs.
RECORDED_FORECAST_S = 0.0012


def decode_recorded(
    steps: int,
    *,
    off: list[tuple[float, float]],
    on: list[tuple[float, float]],
    seed: int,
) -> tuple[float, list[bool]]:
    """Measured steps in their order from some place on, begun anew at the end of a course.

    Returns how many times as fast as never looking ahead it was, and which steps looked ahead.
    """
    controller = GainController(16)
    start = random.Random(seed).randrange(len(off))
    all_ms = off_ms = 0.0
    has_looked = []
    for place in range(start, start + steps):
        rest_ms, rest_stall_ms = off[place % len(off)]
        is_ahead = controller.reach > 0
        wall_ms, stall_ms = on[place % len(on)] if is_ahead else (rest_ms, rest_stall_ms)
        all_ms, off_ms = all_ms + wall_ms, off_ms + rest_ms
        has_looked.append(is_ahead)
        forecast_s = RECORDED_FORECAST_S if controller.is_asking else 0.0
        controller.end_step(
            wall_s=wall_ms / 1e3 + (0.0 if is_ahead else forecast_s),
            stall_s=stall_ms / 1e3,
            forecast_s=forecast_s,
            num_absent=10,
            num_foreseen=10,
        )
    return off_ms / all_ms, has_looked


def test_a_gain_that_was_measured_is_found_soon_and_kept() -> None:
    """Single steps differ by half, so a trial must not end by one unlucky pair of windows."""
    off, on = recorded_steps.GEOMETRY_OFF, recorded_steps.GEOMETRY_ON
    gain = sum(wall for wall, _ in off) / sum(wall for wall, _ in on)
    assert gain > 1.3
    runs = [decode_recorded(400, off=off, on=on, seed=seed) for seed in range(60)]
    ratios = [ratio for ratio, _ in runs]
    assert fmean(ratios) > 1.0 + 0.8 * (gain - 1.0)
    assert min(ratios) > 0.95
    kept = [fmean(looked[40:]) for _, looked in runs]
    assert fmean(share > 0.5 for share in kept) >= 0.9
    tried = [looked.index(True) for _, looked in runs if any(looked)]
    assert sorted(tried)[len(runs) // 2] == FIRST_STEPS + ASKED_STEPS


def test_a_loss_that_was_measured_stays_within_two_percent() -> None:
    off, on = recorded_steps.NANO_OFF, recorded_steps.NANO_ON
    assert sum(wall for wall, _ in off) < 0.7 * sum(wall for wall, _ in on)
    runs = [decode_recorded(1500, off=off, on=on, seed=seed) for seed in range(60)]
    assert fmean(ratio for ratio, _ in runs) > 0.98
    assert all(any(looked) for _, looked in runs), "its stall is worth a trial"


def test_a_bad_control_is_repeated_before_it_is_believed() -> None:
    course = Course()
    course.run(40, on_s=0.7, off_s=1.0)
    while course.controller.reach:
        course.run(1, on_s=0.7, off_s=1.0)
    course.run(4, on_s=0.7, off_s=0.5)  # a control without look-ahead that is fast by chance
    late = course.run(400, on_s=0.7, off_s=1.0)
    assert sum(reach > 0 for reach in late) > 0.85 * len(late)


@pytest.mark.parametrize("tokens", [60, 150, 200, 300])
def test_a_loss_that_was_measured_is_no_loss_to_short_answers_either(tokens: int) -> None:
    off, on = recorded_steps.NANO_OFF, recorded_steps.NANO_ON
    ratios = [decode_recorded(tokens, off=off, on=on, seed=seed)[0] for seed in range(60)]
    assert fmean(ratios) > 0.98

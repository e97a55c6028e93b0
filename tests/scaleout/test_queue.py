"""The queue alone, under every order of ends and deaths; no Ray."""

from hypothesis import given
from hypothesis import strategies as st

from outrider.runtime.scaleout.queue import LATE_AT_LEAST_S, LATE_FACTOR, TaskQueue


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@given(
    tasks=st.integers(0, 12),
    workers=st.integers(1, 4),
    events=st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.floats(0, 40)), max_size=80),
)
def test_every_task_is_done_once_whoever_dies(tasks, workers, events):
    """Workers take, finish and die at random; afterwards all finish. Each task counts once."""
    clock, drawn = Clock(), []
    queue = TaskQueue((drawn.append(task) or task for task in range(tasks)), clock=clock)
    held = [None] * workers
    done = []

    def refill():
        for worker in range(workers):
            if held[worker] is None:
                held[worker] = queue.take()

    for worker, dies, seconds in events:
        refill()
        # Nothing is drawn before somebody can do it.
        assert len(drawn) <= len(done) + workers
        clock.now += seconds
        job = held[worker % workers]
        held[worker % workers] = None
        if job is None:
            continue
        if dies:
            queue.die(job)
        elif queue.finish(job):
            done.append(job.task)
        assert not queue.is_over or len(done) == tasks
    for _ in range(3 * tasks + 1):
        refill()
        for worker, job in enumerate(held):
            if job is not None and queue.finish(job):
                done.append(job.task)
            held[worker] = None
    assert sorted(done) == list(range(tasks))
    refill()
    assert queue.is_over and held == [None] * workers


def test_a_late_task_is_given_out_once_more_and_its_first_result_counts():
    clock = Clock()
    queue = TaskQueue("abc", clock=clock)
    slow, first, second = queue.take(), queue.take(), queue.take()
    clock.now = 4.0
    assert queue.finish(first) and queue.finish(second)
    clock.now = LATE_FACTOR * 4.0
    assert queue.take() is None  # not late yet
    clock.now += 0.1
    assert clock.now > LATE_AT_LEAST_S
    assert queue.take() is slow
    assert queue.take() is None  # twice is enough
    assert queue.finish(slow) and queue.is_over
    assert not queue.finish(slow)  # the other worker's result


def test_a_dead_copy_of_a_late_task_is_not_run_again_while_the_other_lives():
    clock = Clock()
    queue = TaskQueue("ab", clock=clock)
    slow, quick = queue.take(), queue.take()
    queue.finish(quick)
    clock.now = 100.0
    assert queue.take() is slow
    queue.die(slow)
    assert slow.deaths == 1 and not queue.is_over
    queue.die(slow)
    assert queue.take() is slow
    assert queue.finish(slow) and queue.is_over

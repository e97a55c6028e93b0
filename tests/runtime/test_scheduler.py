"""The scheduler: every token runs once, in order, within the limits, and nobody is passed over."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.runtime.scheduler import Scheduler


@dataclass(eq=False)
class Job:
    """A prompt and an answer of known lengths; keeps which of its tokens ran."""

    num_prompt: int
    num_answer: int
    ran: list[int] = field(default_factory=list)
    num_sampled: int = 0
    is_cancelled: bool = False

    @property
    def num_pending(self) -> int:
        return self.num_prompt + self.num_sampled - len(self.ran)

    @property
    def is_prefill(self) -> bool:
        return len(self.ran) < self.num_prompt

    @property
    def is_finished(self) -> bool:
        return self.is_cancelled or self.num_sampled >= self.num_answer


def run(scheduler, batch):
    """What the engine does with a batch: run the rows, sample where the newest token was run."""
    for span in batch.spans:
        job = span.sequence
        for _ in range(span.num_tokens):
            job.ran.append(len(job.ran))
        assert span.is_last == (job.num_pending == 0)
        if span.is_last:
            job.num_sampled += 1


jobs = st.lists(
    st.builds(Job, num_prompt=st.integers(1, 40), num_answer=st.integers(1, 6)), max_size=8
)
limits = st.integers(1, 4).flatmap(
    lambda num_seqs: st.tuples(st.just(num_seqs), st.integers(num_seqs, 24))
)


def steps_of(scheduler, *, limit: int = 5000):
    for _ in range(limit):
        batch = scheduler.schedule()
        if not batch.spans:
            return
        yield batch
    raise AssertionError("the scheduler never came to an end")


@given(jobs=jobs, limits=limits)
def test_every_job_runs_all_its_tokens_once_and_ends(jobs, limits):
    num_seqs, num_tokens = limits
    scheduler = Scheduler(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)
    for job in jobs:
        scheduler.add(job)
    for batch in steps_of(scheduler):
        run(scheduler, batch)
    for job in jobs:
        # The last sampled token is never run: there is nothing to sample after it.
        assert job.ran == list(range(job.num_prompt + job.num_answer - 1))
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert list(scheduler.sequences()) == []


@given(jobs=jobs, limits=limits)
def test_a_pass_keeps_both_limits_and_its_rows_join_without_gaps(jobs, limits):
    num_seqs, num_tokens = limits
    scheduler = Scheduler(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)
    for job in jobs:
        scheduler.add(job)
    for batch in steps_of(scheduler):
        assert 1 <= len(batch.spans) <= num_seqs
        assert len({id(span.sequence) for span in batch.spans}) == len(batch.spans)
        assert 1 <= batch.num_tokens <= num_tokens
        ends = [0]
        for span in batch.spans:
            assert span.start == ends[-1] < span.end
            ends.append(span.end)
        assert batch.num_tokens == ends[-1]
        run(scheduler, batch)


@given(jobs=jobs, limits=limits)
def test_whoever_decodes_runs_in_every_pass(jobs, limits):
    # A long prompt beside running streams must not make them skip a token.
    num_seqs, num_tokens = limits
    scheduler = Scheduler(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)
    for job in jobs:
        scheduler.add(job)
    for batch in steps_of(scheduler):
        decoding = {id(job) for job in jobs if job.ran and not job.is_prefill}
        decoding -= {id(job) for job in jobs if job.is_finished}
        assert decoding <= {id(span.sequence) for span in batch.spans}
        run(scheduler, batch)


@given(jobs=jobs, limits=limits)
def test_first_come_is_first_served(jobs, limits):
    num_seqs, num_tokens = limits
    scheduler = Scheduler(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)
    for job in jobs:
        scheduler.add(job)
    begun: list[int] = []
    prefilled: list[int] = []
    for batch in steps_of(scheduler):
        run(scheduler, batch)
        for span in batch.spans:
            place = next(i for i, job in enumerate(jobs) if job is span.sequence)
            if place not in begun:
                begun.append(place)
            if not span.sequence.is_prefill and place not in prefilled:
                prefilled.append(place)
    assert begun == prefilled == list(range(len(jobs)))


@given(
    jobs=jobs,
    limits=limits,
    cancels=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 7)), max_size=8),
    late=st.lists(st.integers(0, 12), max_size=8),
)
def test_cancelled_jobs_never_run_again_and_late_ones_are_served(jobs, limits, cancels, late):
    num_seqs, num_tokens = limits
    scheduler = Scheduler(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)
    arrivals = {index: late[index] if index < len(late) else 0 for index in range(len(jobs))}
    for step in range(5000):
        for index, at in arrivals.items():
            if at == step:
                scheduler.add(jobs[index])
        for at, index in cancels:
            if at == step and index < len(jobs):
                jobs[index].is_cancelled = True
        batch = scheduler.schedule()
        assert not any(span.sequence.is_finished for span in batch.spans)
        if not batch.spans and step > 12:
            break
        run(scheduler, batch)
    else:
        raise AssertionError("the scheduler never came to an end")
    assert all(job.is_finished for job in jobs)
    for job in jobs:
        assert job.ran == sorted(set(job.ran))


@pytest.mark.parametrize(
    ("num_seqs", "num_tokens"),
    [
        pytest.param(0, 4, id="no-sequence"),
        pytest.param(-1, 4, id="negative"),
        pytest.param(3, 2, id="fewer-tokens-than-sequences"),
        pytest.param(1, 0, id="no-token"),
    ],
)
def test_limits_under_which_somebody_could_starve_are_refused(num_seqs, num_tokens):
    with pytest.raises(ValueError, match="at least one sequence is needed"):
        Scheduler(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)


def test_an_idle_scheduler_plans_nothing():
    batch = Scheduler(max_num_seqs=1, max_num_batched_tokens=1).schedule()
    assert batch.spans == ()
    assert batch.num_tokens == 0

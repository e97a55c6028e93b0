"""The scheduler: every token runs once, in order, within the limits, and nobody is passed over."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.runtime.scheduler import BatchLimits, Scheduler, deal, saturating_tokens


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
    scheduler = Scheduler(BatchLimits(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens))
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
    scheduler = Scheduler(BatchLimits(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens))
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
    scheduler = Scheduler(BatchLimits(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens))
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
    scheduler = Scheduler(BatchLimits(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens))
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
    scheduler = Scheduler(BatchLimits(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens))
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
        BatchLimits(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)


def test_an_idle_scheduler_plans_nothing():
    batch = Scheduler(BatchLimits(max_num_seqs=1, max_num_batched_tokens=1)).schedule()
    assert batch.spans == ()
    assert batch.num_tokens == 0


owners = st.lists(st.sampled_from("abc"), min_size=8, max_size=8)


@given(jobs=jobs, limits=limits, owners=owners, piece=st.integers(1, 12), rest=st.integers(0, 5))
def test_with_owners_and_pieces_everybody_still_gets_every_token(jobs, limits, owners, piece, rest):
    num_seqs, num_tokens = limits
    scheduler = Scheduler(
        BatchLimits(
            max_num_seqs=num_seqs,
            max_num_batched_tokens=num_tokens,
            max_prefill_tokens=piece,
            min_piece_tokens=rest,
        )
    )
    for job, owner in zip(jobs, owners, strict=False):
        scheduler.add(job, owner=owner)
    for batch in steps_of(scheduler):
        decoding = [job for job in jobs if job.ran and not job.is_prefill and not job.is_finished]
        prompt_tokens = sum(span.num_tokens for span in batch.spans if span.sequence.is_prefill)
        assert batch.num_tokens <= num_tokens
        if decoding:
            # Each prompt may bring one rest on top of the piece.
            num_prompts = sum(span.sequence.is_prefill for span in batch.spans)
            assert prompt_tokens <= piece + rest * num_prompts
        run(scheduler, batch)
    for job in jobs:
        assert job.ran == list(range(job.num_prompt + job.num_answer - 1))


def test_a_crowd_of_one_owner_leaves_the_next_place_to_another():
    scheduler = Scheduler(BatchLimits(max_num_seqs=2, max_num_batched_tokens=64))
    crowd = [Job(1, 2) for _ in range(10)]
    for job in crowd:
        scheduler.add(job, owner="crowd")
    late = Job(1, 2)
    scheduler.add(late, owner="late")
    run(scheduler, scheduler.schedule())
    assert (bool(crowd[0].ran), bool(late.ran), bool(crowd[1].ran)) == (True, True, False)


def test_a_short_prompt_does_not_wait_for_a_long_one_of_another_owner():
    scheduler = Scheduler(BatchLimits(max_num_seqs=4, max_num_batched_tokens=16))
    long, short = Job(1000, 1), Job(8, 1)
    scheduler.add(long, owner="a")
    run(scheduler, scheduler.schedule())
    scheduler.add(short, owner="b")
    run(scheduler, scheduler.schedule())
    assert short.is_finished
    assert len(long.ran) == 24


def test_a_short_rest_runs_with_the_piece_before_it():
    limits = BatchLimits(
        max_num_seqs=2, max_num_batched_tokens=64, max_prefill_tokens=8, min_piece_tokens=3
    )
    scheduler = Scheduler(limits)
    stream, prompt = Job(1, 9), Job(19, 1)
    scheduler.add(stream)
    run(scheduler, scheduler.schedule())
    scheduler.add(prompt)
    pieces = []
    while not prompt.is_finished:
        before = len(prompt.ran)
        run(scheduler, scheduler.schedule())
        pieces.append(len(prompt.ran) - before)
    assert pieces == [8, 11]


@given(
    jobs=jobs,
    sizes=st.lists(st.integers(0, 10), min_size=8, max_size=8),
    owners=owners,
    room=st.integers(10, 25),
)
def test_memory_for_keys_is_never_promised_twice_and_nobody_starves(jobs, sizes, owners, room):
    scheduler = Scheduler(BatchLimits(max_num_seqs=8, max_kv_tokens=room))
    size_of = {id(job): size for job, size in zip(jobs, sizes, strict=False)}
    for job, owner in zip(jobs, owners, strict=False):
        scheduler.add(job, owner=owner, num_kv_tokens=size_of[id(job)])
    for batch in steps_of(scheduler):
        under_way = [job for job in jobs if job.ran and not job.is_finished]
        running = {id(job) for job in under_way} | {id(span.sequence) for span in batch.spans}
        assert sum(size_of[one] for one in running) <= room
        run(scheduler, batch)
    assert all(job.is_finished for job in jobs)


def test_what_can_never_fit_is_refused():
    scheduler = Scheduler(BatchLimits(max_kv_tokens=10))
    with pytest.raises(ValueError, match="11 tokens in a KV cache of 10"):
        scheduler.add(Job(1, 1), num_kv_tokens=11)
    assert scheduler.num_waiting == 0


def test_a_paused_job_leaves_its_place_but_keeps_its_memory():
    scheduler = Scheduler(BatchLimits(max_num_seqs=1, max_num_batched_tokens=8, max_kv_tokens=10))
    first, small, large = Job(1, 3), Job(1, 1), Job(1, 1)
    scheduler.add(first, num_kv_tokens=6)
    run(scheduler, scheduler.schedule())
    scheduler.pause(first)
    scheduler.add(small, num_kv_tokens=4)
    scheduler.add(large, num_kv_tokens=5)
    run(scheduler, scheduler.schedule())
    assert (len(first.ran), small.is_finished) == (1, True)
    assert scheduler.schedule().spans == ()  # large does not fit beside what first holds
    assert (scheduler.num_paused, scheduler.num_waiting, scheduler.num_kv_tokens) == (1, 1, 6)
    scheduler.resume(first)
    for _ in range(2):
        batch = scheduler.schedule()
        assert [span.sequence for span in batch.spans] == [first]
        run(scheduler, batch)
    assert [span.sequence for span in scheduler.schedule().spans] == [large]


def test_a_cancelled_paused_job_gives_its_memory_back():
    scheduler = Scheduler(BatchLimits(max_kv_tokens=10))
    job = Job(1, 3)
    scheduler.add(job, num_kv_tokens=10)
    run(scheduler, scheduler.schedule())
    scheduler.pause(job)
    job.is_cancelled = True
    scheduler.forget_finished()
    assert (scheduler.num_paused, scheduler.num_kv_tokens) == (0, 0)
    assert list(scheduler.sequences()) == []


@given(wanted=st.lists(st.integers(0, 50), max_size=6), room=st.integers(0, 120))
def test_shares_use_all_room_and_differ_only_for_who_wants_less(wanted, room):
    shares = deal(wanted, room)
    assert sum(shares) == min(room, sum(wanted))
    assert all(0 <= share <= want for share, want in zip(shares, wanted, strict=True))
    unserved = [share for share, want in zip(shares, wanted, strict=True) if share < want]
    if unserved:
        # Whoever got less than wanted got as much as anybody, to one token.
        assert min(unserved) >= max(shares) - 1


@pytest.mark.parametrize(("num_experts", "top_k"), [(64, 6), (128, 8), (8, 2), (60, 4)])
def test_a_saturating_piece_uses_most_experts_and_a_token_less_does_not(num_experts, top_k):
    num_tokens = saturating_tokens(num_experts, top_k)
    unused = (1 - top_k / num_experts) ** num_tokens
    assert unused <= 0.05 < unused / (1 - top_k / num_experts)
    assert saturating_tokens(4, 4) == 1

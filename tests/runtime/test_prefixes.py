"""Kept prompts: found if they are the same, let go before anybody waits, and exact to the bit."""

import random
from dataclasses import dataclass, field

import engines
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.runtime.prefixes import BLOCK_TOKENS, PrefixCache
from outrider.runtime.request import GenerationRequest
from outrider.runtime.scheduler import BatchLimits, Scheduler

GROWTH = 64


@dataclass
class Rows:
    """What a KV cache holds, as the tokens that its rows are of."""

    token_ids: list[int] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        return -(-len(self.token_ids) // GROWTH) * GROWTH

    def copied(self, num_tokens: int) -> "Rows":
        return Rows(self.token_ids[:num_tokens])


@dataclass(eq=False)
class Job:
    """A prompt and an answer of a known length; the answer's tokens are negative."""

    prompt_token_ids: list[int]
    num_answer: int
    kv: Rows = field(default_factory=Rows)
    num_computed: int = 0
    num_cached_tokens: int = 0
    num_sampled: int = 0
    is_cancelled: bool = False

    @property
    def all_ids(self) -> list[int]:
        return self.prompt_token_ids + [-1 - place for place in range(self.num_sampled)]

    @property
    def num_pending(self) -> int:
        return len(self.all_ids) - self.num_computed

    @property
    def is_prefill(self) -> bool:
        return self.num_computed < len(self.prompt_token_ids)

    @property
    def is_finished(self) -> bool:
        return self.is_cancelled or self.num_sampled >= self.num_answer

    @property
    def kv_tokens(self) -> int:
        return -(-(len(self.prompt_token_ids) + self.num_answer) // GROWTH) * GROWTH


def run(batch, cache):
    """What the engine does with a batch."""
    for span in batch.spans:
        job = span.sequence
        end = job.num_computed + span.num_tokens
        job.kv.token_ids += job.all_ids[job.num_computed : end]
        job.num_computed = end
        assert job.kv.token_ids == job.all_ids[:end], "rows of another text"
        if span.is_last:
            if not job.num_sampled:
                cache.offer(job)
            job.num_sampled += 1


# Prompts of a few kinds of blocks, so that many begin alike, and ends that fill no block.
prompts = st.tuples(
    st.lists(st.sampled_from([1, 2]), max_size=4), st.integers(1, BLOCK_TOKENS)
).map(lambda parts: [i for kind in parts[0] for i in [kind] * BLOCK_TOKENS] + [3] * parts[1])
jobs = st.builds(Job, prompt_token_ids=prompts, num_answer=st.integers(1, 40))


@settings(deadline=None)
@given(
    st.lists(jobs, min_size=1, max_size=12),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    st.randoms(use_true_random=False),
)
def test_every_job_ends_within_the_memory_and_on_rows_of_its_own_text(
    todo, num_seqs, share, chance
):
    max_kv_tokens = 4 * GROWTH
    cache = PrefixCache(int(max_kv_tokens * share))
    limits = BatchLimits(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=100,
        max_prefill_tokens=50,
        max_kv_tokens=max_kv_tokens,
    )
    scheduler = Scheduler(limits, leftovers=cache)
    open_jobs, waiting = [], list(todo)
    for _ in range(2000):
        if waiting and chance.random() < 0.5:
            job = waiting.pop()
            scheduler.add(job, num_kv_tokens=job.kv_tokens)
            open_jobs.append(job)
        elif open_jobs and chance.random() < 0.1:
            chance.choice(open_jobs).is_cancelled = True
            scheduler.forget_finished()
        batch = scheduler.schedule()
        cache.check()
        assert scheduler.num_kv_tokens + cache.num_tokens <= max_kv_tokens
        assert batch.spans or not scheduler.num_waiting, "kept prompts keep a request waiting"
        run(batch, cache)
        open_jobs = [job for job in open_jobs if not job.is_finished]
        if not waiting and not open_jobs:
            break
    scheduler.forget_finished()
    cache.check()
    assert not open_jobs and not cache._running
    for job in todo:
        assert job.num_cached_tokens % BLOCK_TOKENS == 0
        assert job.num_cached_tokens < len(job.prompt_token_ids)


def ended(cache, prompt, num_answer=1):
    """A request that has run by itself."""
    scheduler = Scheduler(BatchLimits(max_kv_tokens=1 << 20), leftovers=cache)
    job = Job(prompt, num_answer)
    scheduler.add(job, num_kv_tokens=job.kv_tokens)
    while not job.is_finished:
        run(scheduler.schedule(), cache)
    scheduler.forget_finished()
    cache.check()
    return job


def test_the_longest_beginning_in_whole_blocks_is_found_and_one_token_left_to_run():
    cache = PrefixCache(10_000)
    prompt = list(range(3 * BLOCK_TOKENS))
    assert ended(cache, prompt).num_cached_tokens == 0
    assert ended(cache, prompt).num_cached_tokens == 2 * BLOCK_TOKENS
    assert ended(cache, [*prompt, 7]).num_cached_tokens == 3 * BLOCK_TOKENS
    assert ended(cache, [*prompt[:-1], 7, 7]).num_cached_tokens == 2 * BLOCK_TOKENS
    assert ended(cache, [7, *prompt]).num_cached_tokens == 0


def test_a_running_request_s_prompt_is_reused():
    cache = PrefixCache(0)
    scheduler = Scheduler(BatchLimits(), leftovers=cache)
    prompt = list(range(2 * BLOCK_TOKENS))
    first, second = Job(prompt, 9), Job([*prompt, 1], 2)
    scheduler.add(first)
    run(scheduler.schedule(), cache)
    scheduler.add(second)
    run(scheduler.schedule(), cache)
    assert second.num_cached_tokens == 2 * BLOCK_TOKENS and not first.is_finished


def test_the_turns_of_a_chat_hold_memory_once():
    cache = PrefixCache(10_000)
    prompt: list[int] = []
    for turn in range(6):
        prompt += [turn] * 50
        ended(cache, prompt)
        assert len(cache) == 1
    ended(cache, prompt[:100])
    assert len(cache) == 1
    ended(cache, [9] * 64)
    assert len(cache) == 2


def test_the_least_recently_used_goes_first():
    cache = PrefixCache(2 * GROWTH)
    one, two, three = ([kind] * 40 for kind in (1, 2, 3))
    ended(cache, one)
    ended(cache, two)
    assert ended(cache, one).num_cached_tokens
    ended(cache, three)
    assert ended(cache, one).num_cached_tokens
    assert not ended(cache, two).num_cached_tokens


# --- the engine ------------------------------------------------------------------------------


def conversations(number: int) -> list[list[int]]:
    """Prompts that begin alike, as chats and a common system prompt make them."""
    chosen = random.Random(number)
    system = engines.prompt_of(70, seed=1)
    found, chat = [], list(system)
    for turn in range(number):
        if chosen.random() < 0.3:
            chat = list(system[: chosen.choice([40, 70])])
        chat = chat + engines.prompt_of(chosen.randint(1, 50), seed=turn + 2)
        found.append(list(chat))
    return found


def served(engine, prompts, *, cancel_every=0):
    """Each prompt's tokens and the logits they were chosen by, with a few at a time."""
    logits, sequences, todo = {}, [], list(prompts)
    run = engine._runner.run

    def recorded(batch):
        output = run(batch)
        for row, sequence in enumerate(output.sampled):
            logits.setdefault(id(sequence), []).append(output.logits[row].clone())
        return output

    engine._runner.run = recorded
    while todo or engine.has_work:
        if todo and engine.num_running < 3:
            request = GenerationRequest(
                prompt_token_ids=todo.pop(0), max_tokens=5, temperature=0.0, ignore_eos=True
            )
            sequences.append(engine.submit(request))
            if cancel_every and len(sequences) % cancel_every == 0:
                engine.step()
                engine.cancel(sequences[-1])
        engine.step()
        scheduler, cache = engine._scheduler, engine._prefixes
        if cache is not None:
            cache.check()
            assert scheduler.num_kv_tokens + cache.num_tokens <= engine.limits.max_kv_tokens
    engine._runner.run = run
    return sequences, [logits.get(id(sequence), []) for sequence in sequences]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2_moe", {"dtype": "fp32"}),
        ("qwen3_moe", {"dtype": "bf16"}),
        ("deepseek", {"dtype": "bf16", "format": "int8"}),
        ("mixtral", {"dtype": "bf16", "num_slots": 3}),
    ],
    ids=["fp32", "bf16", "int8", "offloaded"],
)
def test_logits_are_those_without_it_to_the_bit(models, family, options):
    prompts = conversations(10)
    limits = BatchLimits(max_num_seqs=3, max_prefill_tokens=48, max_kv_tokens=1280)
    with models.engine(family, limits=limits, **options) as plain:
        assert plain._prefixes is None
        _, expected = served(plain, prompts)
    limits = BatchLimits(
        max_num_seqs=3, max_prefill_tokens=48, max_kv_tokens=1280, prefix_share=0.5
    )
    with models.engine(family, limits=limits, **options) as engine:
        if engine._prefixes is None:
            pytest.skip("prompts run through transformers here: nothing is kept")
        sequences, found = served(engine, prompts, cancel_every=4)
    assert sum(sequence.num_cached_tokens for sequence in sequences) >= 5 * 32
    for sequence, mine, theirs in zip(sequences, found, expected, strict=True):
        assert len(mine) == 5 or sequence.finish_reason == "cancelled"
        for one, other in zip(mine, theirs, strict=False):
            assert torch.equal(one, other)

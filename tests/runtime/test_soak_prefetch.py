"""Soak of prefetching: `make soak-prefetch`. Tokens stay, memory, files and threads do not grow."""

import gc
import logging
import os
import random
import time
from typing import Any

import engines
import psutil
import pytest
from engines import prompt_of
from expert_machine import ExpertMachine
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from outrider.runtime import GenerationRequest, SamplingParams
from outrider.runtime.errors import OutriderError
from outrider.runtime.experts import reader
from outrider.runtime.experts.eviction import EVICTIONS
from outrider.runtime.experts.pieces import native_call

FAMILY = "qwen2_moe"
SOAK_S = float(os.environ.get("OUTRIDER_SOAK_S", "600"))
NUM_PROMPTS = 6
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
MAX_GROWTH_BYTES = 24 << 20
"""From the first quarter of the run to its last: what allocators keep, and far below a leak of one
engine's slots a round."""


class MoodyDisk:
    """Stands at os.preadv: delays, short reads, interrupts, errors that pass and some that stay."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.preadv = os.preadv
        self.fails = 0.0

    def __call__(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        mood = self.random.random()
        if mood < 0.05:
            time.sleep(mood * 0.05)
        if mood < self.fails:
            raise OSError(5, "injected")
        if mood > 0.97:
            raise InterruptedError
        if mood > 0.9:
            return self.preadv(fd, [buffers[0][: max(1, len(buffers[0]) // 2)]], offset)
        return self.preadv(fd, buffers, offset)


@pytest.mark.slow
@pytest.mark.timeout(SOAK_S + 600)
def test_no_token_changes_and_nothing_grows(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt_of(3 + 5 * index, seed=index) for index in range(NUM_PROMPTS)]
    with models.engine(FAMILY, prefetch="off") as engine:
        expected = [engine.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]
    # What is logged would be kept by pytest, and with an error its frames and their engine.
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    generator = random.Random(0)
    disk = MoodyDisk(1)
    monkeypatch.setattr(os, "preadv", disk)
    process, sizes = psutil.Process(), []
    ends = time.monotonic() + SOAK_S
    num_served = num_failed = num_cancelled = num_rounds = 0
    while time.monotonic() < ends or num_rounds < 8:
        num_rounds += 1
        wrong = {"make_predictor": engines.WrongPredictor} if generator.random() < 0.3 else {}
        with models.engine(
            FAMILY,
            num_slots=generator.choice([1, 3, 4, 9, 15, 29]),
            prefetch=generator.choice(["on", "auto", "off"]),
            eviction=generator.choice(sorted(EVICTIONS)),
            **wrong,
        ) as engine:
            disk.fails = generator.choice([0.0, 0.0, 0.4])
            # Native reads go past the moody disk, but for each file's first.
            call = generator.choice([native_call(), None])
            monkeypatch.setattr(reader, "native_call", lambda call=call: call)
            for _ in range(3):
                chosen = generator.sample(range(NUM_PROMPTS), generator.randrange(1, 4))
                sequences = [
                    engine.submit(
                        GenerationRequest.from_params(GREEDY, prompt_token_ids=prompts[index])
                    )
                    for index in chosen
                ]
                while not all(sequence.is_finished for sequence in sequences):
                    engine.step()
                    if generator.random() < 0.05:
                        engine.cancel(generator.choice(sequences))
                engine.cancel(sequences[0])  # of one that has ended nothing comes
                for index, sequence in zip(chosen, sequences, strict=True):
                    ids, whole = tuple(sequence.token_ids), expected[index]
                    assert ids == whole[: len(ids)], "a token changed"
                    num_failed += sequence.finish_reason == "error"
                    num_cancelled += sequence.finish_reason == "cancelled"
                    num_served += ids == whole
                    assert sequence.error is None or isinstance(sequence.error, OutriderError)
            disk.fails = 0.0
            executor = engine.tier.executor
            executor.prefetcher.close()
            executor.cache.check()
            assert executor.cache.num_loading == 0
            assert not any(entry.num_pins for entry in executor.cache._entries.values())
        gc.collect()
        sizes.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
    quarter = max(1, len(sizes) // 4)
    early, late = sizes[quarter - 1], sizes[-1]
    assert late[0] - early[0] < MAX_GROWTH_BYTES, f"memory grew: {early} to {late}"
    assert late[1:] == early[1:], f"files or threads are left: {early} to {late}"
    assert num_served > num_rounds, (num_served, num_failed, num_cancelled)
    assert num_cancelled and num_failed, (num_served, num_failed, num_cancelled)


@pytest.mark.slow
@pytest.mark.timeout(SOAK_S + 600)
def test_no_order_of_events_tears_a_slot() -> None:
    ends = time.monotonic() + SOAK_S / 2
    while True:
        run_state_machine_as_test(
            ExpertMachine,
            settings=settings(
                max_examples=400,
                stateful_step_count=80,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        if time.monotonic() >= ends:
            break

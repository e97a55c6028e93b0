"""What must survive, by number: faults of prefetching, prediction, eviction and memory (28 to 34).

Each names its case. Those that need a GPU stand with the CUDA copies.
"""

import os
import threading
import time
from typing import Any

import engines
import numpy as np
import pytest
import torch
from engines import prompt_of

from outrider.collect.schema import ExpertKey
from outrider.predictors.base import Forecast, StepCount
from outrider.runtime.errors import InsufficientMemoryError
from outrider.runtime.experts.layout import TensorView
from outrider.runtime.experts.slots import SlotArena

FAMILY = "qwen2_moe"
TOP_K, NUM_TOKENS = 4, 12
PROMPT = prompt_of(9)


@pytest.fixture(scope="module")
def expected(models: Any) -> list[int]:
    """Greedy tokens with all experts resident and nothing predicted."""
    with models.engine(FAMILY, prefetch="off") as engine:
        return tokens_of(engine)


def tokens_of(engine: Any, *, num_tokens: int = NUM_TOKENS) -> list[int]:
    return engines.generate(engine, [PROMPT], max_tokens=num_tokens).token_ids[0]


class Told:
    """Says before each token that a third of the experts, others each time, are that likely."""

    def __init__(self, loaded: Any, probability: float, *, sleep_s: float = 0.0) -> None:
        self.shape = loaded.shape
        self.probability = probability
        self.sleep_s = sleep_s
        self.num_asked = 0
        self._steps = StepCount()

    def begin(self, prompt_ids: np.ndarray) -> None:
        self._steps.begin()

    def before_token(self, token_id: int, horizon: int) -> Forecast:
        self.num_asked += 1
        time.sleep(self.sleep_s)
        self._steps.before_token()
        size = (self.shape.num_moe_layers, self.shape.num_experts)
        table = np.zeros(size, dtype=np.float32)
        table.reshape(-1)[self.num_asked % 3 :: 3] = self.probability
        return Forecast(self._steps.step + horizon - 1, 0, size[0], table)

    def in_pass(self, layer_idx: int, router_input: torch.Tensor) -> None:
        self._steps.in_pass()

    def observe(self, layer_idx: int, topk_ids: Any, topk_weights: Any, router_input: Any) -> None:
        self._steps.in_pass()


class ThreadDeath(BaseException):
    """What no handler of ordinary errors catches."""


@pytest.mark.parametrize("num_deaths", [1, 2])
def test_fault_28_copy_threads_that_die_cost_speed_only(
    models: Any,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
    python_reads: None,
    num_deaths: int,
) -> None:
    # Two threads copy: after the second death misses are read where they are asked for.
    preadv, deaths = os.preadv, []

    def deadly(fd: int, buffers: list[memoryview], offset: int) -> int:
        is_copying = threading.current_thread().name.startswith("outrider-copy")
        if is_copying and len(deaths) < num_deaths:
            deaths.append(fd)
            raise ThreadDeath
        return preadv(fd, buffers, offset)

    with models.engine(
        FAMILY, num_slots=9, prefetch="on", make_predictor=lambda loaded: Told(loaded, 0.9)
    ) as engine:
        monkeypatch.setattr(os, "preadv", deadly)
        assert tokens_of(engine) == expected
        assert len(deaths) == num_deaths
        assert engine.tier.executor.is_degraded
        engine.tier.executor.cache.check()


@pytest.mark.parametrize("kind", ["not a number", "wrong shape", "raises"])
def test_fault_29_a_broken_predictor_is_switched_off(
    models: Any, expected: list[int], kind: str
) -> None:
    class Broken(Told):
        def before_token(self, token_id: int, horizon: int) -> Forecast:
            forecast = super().before_token(token_id, horizon)
            if kind == "raises":
                raise RuntimeError("no such file")
            table = forecast.probability
            table = np.full_like(table, np.nan) if kind == "not a number" else table[:, 1:]
            return Forecast(forecast.step, 0, self.shape.num_moe_layers, table)

    with models.engine(
        FAMILY, num_slots=9, prefetch="on", make_predictor=lambda loaded: Broken(loaded, 0.9)
    ) as engine:
        assert tokens_of(engine) == expected
        assert engine.tier.executor.is_degraded


def test_fault_29_a_slow_predictor_is_asked_no_more(models: Any) -> None:
    made = []

    def slow(loaded: Any) -> Told:
        made.append(Told(loaded, 0.5, sleep_s=0.02))
        return made[-1]

    with models.engine(FAMILY, prefetch="off") as engine:
        want = tokens_of(engine, num_tokens=60)
    with models.engine(FAMILY, num_slots=9, prefetch="auto", make_predictor=slow) as engine:
        assert tokens_of(engine, num_tokens=60) == want
        assert engine.tier.executor.prefetcher.reach == 0
    # One trial of at most six windows, and never again in this text.
    assert 0 < made[0].num_asked <= 2 * 6 * 6


def test_fault_30_a_copy_that_is_late_is_waited_for(
    models: Any, expected: list[int], monkeypatch: pytest.MonkeyPatch, python_reads: None
) -> None:
    preadv = os.preadv

    def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
        time.sleep(0.002)
        return preadv(fd, buffers, offset)

    with models.engine(
        FAMILY, num_slots=12, prefetch="on", make_predictor=lambda loaded: Told(loaded, 1.0)
    ) as engine:
        monkeypatch.setattr(os, "preadv", slow)
        arena, submit = engine.tier.arena, engine.tier.transfers.submit

        def poisoning(key: Any, slot: int, kind: Any) -> Any:
            arena.poison(slot)  # what is read too early is no number
            return submit(key, slot, kind)

        engine.tier.transfers.submit = poisoning
        # The bandwidth is not known before the first copy, and a slow one would call it all off.
        engine.tier.transfers.bandwidth = lambda: 0.0
        made = engines.generate(engine, [PROMPT], max_tokens=NUM_TOKENS)
    assert made.token_ids[0] == expected
    assert made.traffic.late_hits > 0


@pytest.mark.parametrize("num_slots", [1, TOP_K - 1, TOP_K])
@pytest.mark.parametrize("eviction", ["layer-lfu", "forecast"])
def test_fault_31_an_expert_in_use_is_never_evicted(
    models: Any, expected: list[int], num_slots: int, eviction: str
) -> None:
    # A cache of one token's experts, and smaller ones, which serve a layer in waves.
    with models.engine(
        FAMILY,
        num_slots=num_slots,
        eviction=eviction,
        prefetch="on",
        make_predictor=lambda loaded: Told(loaded, 0.9),
    ) as engine:
        cache, evict = engine.tier.executor.cache, engine.tier.executor.cache._evict

        def watched(victim: ExpertKey) -> int:
            assert not cache._entries[victim].num_pins
            return evict(victim)

        cache._evict = watched  # type: ignore[method-assign]
        assert tokens_of(engine) == expected
        assert cache.counters.evictions > 0


@pytest.mark.parametrize("mode", ["on", "auto", "off"])
@pytest.mark.parametrize(
    "predictor", ["lookahead", "frequent", "random", "wrong", "at random", "none"]
)
def test_fault_32_tokens_are_the_same_whatever_is_predicted(
    models: Any, expected: list[int], mode: str, predictor: str
) -> None:
    make = {
        "wrong": engines.WrongPredictor,
        "at random": lambda loaded: Told(loaded, 1.0),
    }.get(predictor)
    options = {} if make is not None else {"predictor": predictor}
    with models.engine(
        FAMILY, num_slots=11, prefetch=mode, make_predictor=make, **options
    ) as engine:
        assert tokens_of(engine) == expected


def test_fault_33_memory_that_is_not_there_is_said_with_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(num_bytes: int) -> Any:
        raise MemoryError

    monkeypatch.setattr("outrider.runtime.experts.slots.map_memory", refuse)
    views = {"down_proj": TensorView(torch.float32, (8, 8), 0)}
    with pytest.raises(InsufficientMemoryError, match=r"3 expert slots of 4096 bytes") as caught:
        SlotArena(3, views, 4096)
    assert caught.value.exit_code == 4


def test_fault_33_memory_that_runs_out_in_a_pass_ends_its_requests_only(
    models: Any, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with models.engine(FAMILY, num_slots=9) as engine:
        outputs, failures = engine.tier.executor.arithmetic.outputs, []

        def full(*arguments: Any, **options: Any) -> None:
            if not failures:
                failures.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory")
            outputs(*arguments, **options)

        monkeypatch.setattr(engine.tier.executor.arithmetic, "outputs", full)
        with pytest.raises(InsufficientMemoryError, match="out of memory"):
            tokens_of(engine)
        engine.tier.executor.cache.check()
        assert tokens_of(engine) == expected

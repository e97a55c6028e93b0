"""Slots filled before the first pass with what training text used most; no first token waits."""

import threading
from typing import Any

import engines
import numpy as np
import pytest
from engines import prompt_of

from outrider.collect.schema import ExpertKey
from outrider.runtime.experts.cache import SlotState

FAMILY = "qwen2_moe"
PROMPT = prompt_of(5)


@pytest.fixture(scope="module")
def expected(models: Any) -> list[int]:
    with models.engine(FAMILY, prefetch="off") as engine:
        return engines.generate(engine, [PROMPT], max_tokens=6).token_ids[0]


def rising(engine: Any) -> np.ndarray:
    """Frequencies by which the last experts of the last layer are the ones used most."""
    shape = engine.loaded.shape
    return np.arange(shape.num_routed_experts, dtype=np.float32).reshape(
        shape.num_moe_layers, shape.num_experts
    )


def test_the_experts_used_most_are_there_when_the_first_pass_comes(
    models: Any, expected: list[int]
) -> None:
    with models.engine(FAMILY, num_slots=7) as engine:
        tier = engine.tier
        tier.frequencies = rising(engine)
        tier.warm()
        while tier.transfers.outstanding_bytes():
            threading.Event().wait(0.001)
        shape, cache = engine.loaded.shape, tier.executor.cache
        last = shape.num_moe_layers - 1
        hottest = [ExpertKey(last, shape.num_experts - 1 - index) for index in range(7)]
        assert all(cache.state(key) is SlotState.LOADING for key in hottest)
        tier.executor.prefetcher.settle()
        assert set(cache.resident()) == set(hottest)
        for key, slot in cache.resident().items():
            assert bytes(tier.arena.block(slot)).strip(b"\0"), f"{key} was read"
        assert engines.generate(engine, [PROMPT], max_tokens=6).token_ids[0] == expected


def test_a_request_that_comes_at_once_does_not_wait_for_the_warm_start(
    models: Any, expected: list[int]
) -> None:
    with models.engine(FAMILY, num_slots=9, prefetch="off") as engine:
        engine.tier.frequencies = rising(engine)
        engine.tier.warm()
        made = engines.generate(engine, [PROMPT], max_tokens=6)
        assert made.token_ids[0] == expected
        made.traffic.check()
        cache = engine.tier.executor.cache
        cache.check()
        assert cache.num_loading == 0
        assert cache.counters.prefetch_issued == 0


def test_without_frequencies_nothing_is_read(models: Any) -> None:
    with models.engine(FAMILY, num_slots=7) as engine:
        engine.tier.warm()
        assert engine.tier.executor.cache.num_free == 7

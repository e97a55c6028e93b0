"""An engine whose experts come over a host cache, and misses computed where they lie.

Both arenas are host memory and the link is a plain copy: all of a card's way but the card.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import engines
import pytest
import torch
from engines import prompt_of

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.runtime import Engine, GenerationRequest, SamplingParams
from outrider.runtime.config import EngineConfig
from outrider.runtime.errors import DeviceLostError, InsufficientMemoryError
from outrider.runtime.experts.cache import ExpertCache, Kind
from outrider.runtime.experts.eviction import make_eviction
from outrider.runtime.experts.slots import SlotArena
from outrider.runtime.host_misses import HostMisses
from outrider.runtime.models.loading import load_tokenizer
from outrider.runtime.testing import InstantLink, ManualTransfer, VirtualClock
from outrider.runtime.tier import build_tier, expert_source, over_host

FAMILY = "qwen2_moe"
PROMPT = prompt_of(9)
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def expected(models: Any) -> tuple[int, ...]:
    with models.engine(FAMILY, prefetch="off") as engine:
        return engine.generate(PROMPT, GREEDY)[0].token_ids


@contextmanager
def over_two_tiers(
    models: Any, *, num_slots: int, num_host_slots: int, on_miss: str = "fetch", **options: Any
) -> Iterator[Engine]:
    loaded = models.loaded(FAMILY)
    source = expert_source(loaded, "auto")
    config = EngineConfig(expert_memory=num_slots * source.nbytes, **options)
    tier = build_tier(loaded, config, source=source)
    tier.transfers.close()
    tier.host_arena = SlotArena(num_host_slots, source.views, source.nbytes, is_pinned=False)
    told: Any = SimpleNamespace(on_miss=on_miss, verify_on_load=False)
    tier.transfers, tier.executor._host_misses = over_host(
        loaded, told, source, (tier.host_arena, tier.arena), make_link=InstantLink
    )
    tier.executor._transfers = tier.executor.prefetcher._transfers = tier.transfers
    with Engine(loaded, tier, config=config, tokenizer=load_tokenizer(loaded.folder)) as engine:
        yield engine


@pytest.mark.parametrize("num_host_slots", [8, 15, 30])
@pytest.mark.parametrize("prefetch", ["off", "on"])
def test_tokens_are_the_same_over_a_host_cache(
    models: Any, expected: tuple[int, ...], num_host_slots: int, prefetch: str
) -> None:
    with over_two_tiers(
        models, num_slots=9, num_host_slots=num_host_slots, prefetch=prefetch
    ) as engine:
        made = engines.generate(engine, [PROMPT], max_tokens=10)
        assert tuple(made.token_ids[0]) == expected
        transfers: Any = engine.tier.transfers
        assert transfers.num_from_host > 0
        if num_host_slots == 30:
            assert transfers.num_from_disk <= 30, "what the host holds is never read again"
        transfers.host.check()
        engine.tier.executor.cache.check()


@pytest.mark.parametrize("mode", ["host", "auto"])
def test_misses_computed_on_the_host_agree_with_fetched_ones(models: Any, mode: str) -> None:
    with models.engine(FAMILY, prefetch="off") as engine:
        want = engines.generate(engine, [PROMPT], max_tokens=10)
    with over_two_tiers(
        models, num_slots=5, num_host_slots=30, on_miss=mode, prefetch="off"
    ) as engine:
        got = engines.generate(engine, [PROMPT], max_tokens=10)
        got.traffic.check()
        assert got.traffic.host_computed > 0
        if mode == "host":
            assert got.traffic.host_computed > got.traffic.misses / 2
        transfers: Any = engine.tier.transfers
        transfers.pump()
        assert not any(entry.num_pins for entry in transfers.host._entries.values())
    for ours, theirs in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_not_fetched_is_said_not_to_be_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EngineConfig().is_exact
    monkeypatch.setattr("outrider.runtime.config.cuda_device_count", lambda: 1)
    assert not EngineConfig(on_miss="host", device="cuda").is_exact


def test_cpu_and_link_are_given_work_that_ends_together() -> None:
    nbytes, clock = 1000, VirtualClock()
    disk = ManualTransfer(nbytes=nbytes, bandwidth=1000.0)  # an expert a second

    class Slow:
        def outputs(self, module: Any, states: Any, **arguments: Any) -> None:
            clock.advance(3.0 * len(arguments["slots"]))

    shape = ModelShape(1, 20, 2, 8, 8, "")
    host = ExpertCache(20, eviction=make_eviction("lfu", shape=shape, num_slots=20))
    cache = ExpertCache(20, eviction=make_eviction("lfu", shape=shape, num_slots=20))
    keys = [ExpertKey(0, index) for index in range(20)]
    for key in keys:
        slot = host.reserve(key, Kind.ON_DEMAND)
        assert slot is not None
        host.commit(slot)
    misses = HostMisses(
        "auto",
        host=host,
        arithmetic=Slow(),  # type: ignore[arg-type]
        transfers=disk,
        nbytes=nbytes,
        clock=clock,
    )
    assert misses.choose(keys[:8], cache) == keys[:1], "one, to learn what it takes"
    states = torch.zeros(1, 8)
    misses.compute(
        None, states, rows={keys[0]: torch.zeros(1, dtype=torch.long).numpy()}, top_k=2,
        out=torch.zeros(2, 8),
    )  # fmt: skip
    # Two of eight take the CPU 6 s; the link brings the other six meanwhile.
    assert misses.choose(keys[:8], cache) == keys[:2]
    disk.submit(keys[19], 0, Kind.ON_DEMAND)
    disk.submit(keys[18], 1, Kind.ON_DEMAND)
    disk.submit(keys[17], 2, Kind.ON_DEMAND)
    disk.submit(keys[16], 3, Kind.ON_DEMAND)
    assert misses.choose(keys[:8], cache) == keys[:3], "a link that is busy leaves more"


def test_fault_35_a_lost_device_ends_the_engine(models: Any) -> None:
    with models.engine(FAMILY, num_slots=9) as engine:
        outputs = engine.tier.executor.arithmetic
        calls: list[int] = []

        def broken(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        outputs.outputs = broken
        sequence = engine.submit(GenerationRequest.from_params(GREEDY, prompt_token_ids=PROMPT))
        with pytest.raises(DeviceLostError, match="illegal memory access"):
            engine.step()
        assert sequence.finish_reason == "error"
        with pytest.raises(DeviceLostError):
            engine.step()
        with pytest.raises(DeviceLostError):
            engine.generate(PROMPT, GREEDY)
        assert len(calls) == 1, "nothing is computed on it any more"
        assert not isinstance(sequence.error, InsufficientMemoryError)

"""Cache, prefetcher and controller together on a simulated link: good forecasts save stall time,
bad ones are found out and cost next to nothing. Nothing here is a measurement of a real disk."""

from dataclasses import dataclass

import numpy as np
import pytest

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.predictors.base import Forecast
from outrider.predictors.random import RandomPredictor
from outrider.runtime.experts.cache import ExpertCache, Kind
from outrider.runtime.experts.eviction import make_eviction
from outrider.runtime.experts.prefetcher import Prefetcher
from outrider.runtime.testing import ManualTransfer, VirtualClock

SHAPE = ModelShape(6, 32, 4, 8, 8, "")
NBYTES = 1000
COMPUTE_S = 4.0
"""A layer computes for as long as the link needs for four experts."""
BANDWIDTH = 1000.0


@dataclass
class Outcome:
    stall_s: float = 0.0
    copied: int = 0
    hits: int = 0
    lookups: int = 0


class Link:
    """Serves a ManualTransfer as time passes: one copy after the other, on-demand first."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.engine = ManualTransfer(nbytes=NBYTES, bandwidth=BANDWIDTH)
        self.num_copied = 0
        self.progress_s = 0.0

    def serve(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.progress_s += seconds
        while self.engine.pending and self.progress_s >= NBYTES / BANDWIDTH:
            self.progress_s -= NBYTES / BANDWIDTH
            self.engine.complete(self.engine.pending[0])
            self.num_copied += 1
        if not self.engine.pending:
            self.progress_s = 0.0
        else:
            self.engine.start(self.engine.pending[0])


def routing(num_steps: int, seed: int) -> np.ndarray:
    """[steps, layers, top_k] ids: some experts are popular, tokens differ."""
    generator = np.random.default_rng(seed)
    utility = generator.normal(size=(SHAPE.num_moe_layers, SHAPE.num_experts))
    noise = generator.gumbel(size=(num_steps, *utility.shape))
    return np.argsort(-(utility + noise), axis=-1)[..., : SHAPE.top_k]


def decode(ids: np.ndarray, *, mode: str, predictor: str, num_slots: int = 48) -> Outcome:
    clock = VirtualClock()
    link = Link(clock)
    cache = ExpertCache(
        num_slots, eviction=make_eviction("layer-lru", shape=SHAPE, num_slots=num_slots)
    )
    prefetcher = Prefetcher(
        cache,
        link.engine,
        shape=SHAPE,
        nbytes=NBYTES,
        mode=mode,  # type: ignore[arg-type]
        clock=clock,
    )
    blind = RandomPredictor(SHAPE, confidence=0.95)
    outcome = Outcome()
    for step, layers in enumerate(ids[:-1], start=1):
        if predictor == "random":
            blind.observe(0, layers[:1], layers[:1], None)
            prefetcher.offer(blind.before_token(0, 1))
        else:
            for horizon in (0, 1):
                table = np.full((SHAPE.num_moe_layers, SHAPE.num_experts), 0.01, np.float32)
                np.put_along_axis(table, ids[step - 1 + horizon], 0.95, axis=1)
                prefetcher.offer(Forecast(step + horizon, 0, SHAPE.num_moe_layers, table))
        began, stall_s = clock.now, 0.0
        num_missed = 0
        for layer_idx, experts in enumerate(layers.tolist()):
            keys = [ExpertKey(layer_idx, expert_idx) for expert_idx in experts]
            prefetcher.settle()
            resident = [key for key in keys if cache.lookup(key) is not None]
            outcome.lookups += len(keys)
            outcome.hits += len(resident)
            with cache.pin(resident) as lease:
                for key in resident:
                    cache.record_use(key)
                transfers = []
                for key in keys:
                    if key not in lease.slots:
                        transfer = prefetcher.claim(key)
                        if transfer is None:
                            prefetcher.missed(key)
                            slot = cache.reserve(key, Kind.ON_DEMAND, keep=prefetcher.wanted)
                            assert slot is not None
                            transfer = link.engine.submit(key, slot, Kind.ON_DEMAND)
                            num_missed += 1
                        transfers.append(transfer)
                prefetcher.advance(step, layer_idx)
                while not all(transfer.done() for transfer in transfers):
                    link.serve(0.1)
                    stall_s += 0.1
                for transfer in transfers:
                    cache.commit(transfer.slot)
                    lease.add(transfer.key)
                    cache.record_use(transfer.key)
                link.serve(COMPUTE_S)
            cache.check()
        prefetcher.end_step(
            stall_s=stall_s, on_demand_bytes=num_missed * NBYTES, wall_s=clock.now - began
        )
        outcome.stall_s += stall_s
    outcome.copied = link.num_copied
    return outcome


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return routing(600, seed=0)


@pytest.fixture(scope="module")
def without(ids: np.ndarray) -> Outcome:
    return decode(ids, mode="off", predictor="oracle")


@pytest.mark.parametrize(("mode", "share"), [("on", 0.05), ("auto", 0.15)])
def test_true_forecasts_save_nearly_all_stalls(
    ids: np.ndarray, without: Outcome, mode: str, share: float
) -> None:
    outcome = decode(ids, mode=mode, predictor="oracle")
    assert outcome.stall_s < share * without.stall_s
    assert outcome.copied <= 1.05 * without.copied, "no byte is fetched in vain"


def test_false_forecasts_are_found_out(ids: np.ndarray, without: Outcome) -> None:
    blind = decode(ids, mode="on", predictor="random")
    assert blind.copied > 1.3 * without.copied, "followed blindly, they cost a lot"
    careful = decode(ids, mode="auto", predictor="random")
    assert careful.copied < 1.2 * without.copied
    assert careful.stall_s < 1.05 * without.stall_s

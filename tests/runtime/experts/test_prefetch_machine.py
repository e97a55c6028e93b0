"""Cache, prefetcher, acquisition and copies in any order of events, and what stands in for them."""

from pathlib import Path

import pytest
from expert_machine import SHAPE, ExpertMachine
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from torn_transfer import TornTransfer, torn_copies

from outrider.collect.schema import ExpertKey
from outrider.runtime.errors import TransferError
from outrider.runtime.experts.cache import ExpertCache, Kind
from outrider.runtime.experts.slots import SlotArena
from outrider.runtime.testing import write_experts

QUICK = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_no_order_of_events_tears_a_slot_moves_a_pinned_expert_or_hangs() -> None:
    run_state_machine_as_test(ExpertMachine, settings=QUICK)


@pytest.mark.parametrize("fault", ["commits early", "evicts pinned", "loses a slot"])
def test_the_machine_notices(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine that nothing can fail would prove nothing.
    if fault == "commits early":
        monkeypatch.setattr(
            "outrider.runtime.testing.ManualCopy.done",
            lambda self: self.is_started or self._is_done,
        )
        monkeypatch.setattr(
            "outrider.runtime.testing.ManualCopy.wait",
            lambda self: None if self.is_started else _wait(self),
        )
    elif fault == "evicts pinned":
        monkeypatch.setattr(ExpertCache, "_is_evictable", lambda self, key: key in self.resident())
    else:
        monkeypatch.setattr(
            "outrider.runtime.experts.prefetcher.Prefetcher._cancel_stale",
            lambda self: self._in_flight.clear(),
        )
    with pytest.raises((AssertionError, ValueError, KeyError)):
        run_state_machine_as_test(
            ExpertMachine,
            settings=settings(QUICK, max_examples=200, database=None, phases=[Phase.generate]),
        )


def _wait(copy: object) -> None:
    engine = copy._engine  # type: ignore[attr-defined]
    while not copy._is_done:  # type: ignore[attr-defined]
        engine._serve()
    if copy.error is not None:  # type: ignore[attr-defined]
        raise copy.error  # type: ignore[attr-defined]


def test_a_copy_under_way_is_torn(tmp_path: Path) -> None:
    source = write_experts(tmp_path, SHAPE)
    with SlotArena(1, source.views, source.nbytes) as arena:
        engine = TornTransfer(source, arena, seed=0)
        copy = engine.submit(ExpertKey(0, 0), 0, Kind.ON_DEMAND)
        engine.start(copy)
        assert torn_copies(engine) == [copy]
        assert not source.is_held(copy.key, arena, 0)
        engine.complete(copy)
        assert source.is_held(copy.key, arena, 0)
        engine.refuses = 1.0
        with pytest.raises(TransferError, match="refused"):
            engine.submit(ExpertKey(0, 1), 0, Kind.ON_DEMAND)

"""What every transfer engine owes its callers; a new backend is one more entry in ENGINES."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.runtime.errors import TransferError
from outrider.runtime.experts.cache import ExpertCache, Kind
from outrider.runtime.experts.cuda_link import CudaLink
from outrider.runtime.experts.eviction import make_eviction
from outrider.runtime.experts.slots import SlotArena
from outrider.runtime.experts.thread_transfer import ThreadTransfer
from outrider.runtime.experts.tiered import Link, TieredTransfer
from outrider.runtime.experts.transfer import TransferEngine
from outrider.runtime.testing import InstantLink, ManualTransfer, SyntheticExperts, write_experts

SHAPE = ModelShape(
    num_moe_layers=2, num_experts=6, top_k=2, hidden_size=40, expert_size=24, fingerprint=""
)
KEYS = [ExpertKey(layer_idx, expert_idx) for layer_idx in range(2) for expert_idx in range(6)]

ENGINES: dict[str, Callable[[SyntheticExperts, SlotArena], TransferEngine]] = {
    "manual": lambda source, arena: ManualTransfer(source, arena, bandwidth=1e9),
    "threads-direct": lambda source, arena: ThreadTransfer(source, arena, piece_bytes=4096),
    "threads-buffered": lambda source, arena: ThreadTransfer(source, arena, direct=False),
    "one-thread": lambda source, arena: ThreadTransfer(
        source, arena, num_threads=1, piece_bytes=4096, verify=True
    ),
    "four-threads": lambda source, arena: ThreadTransfer(
        source, arena, num_threads=4, piece_bytes=4096
    ),
}


def tiered(
    source: SyntheticExperts,
    arena: SlotArena,
    *,
    num_host_slots: int,
    make_link: Callable[[SlotArena, SlotArena], Link] = InstantLink,
) -> TransferEngine:
    """Disk, host cache and a link that is a plain copy: all of a card's way but the card."""
    host_arena = SlotArena(num_host_slots, source.views, source.nbytes)
    host = ExpertCache(
        num_host_slots, eviction=make_eviction("lfu", shape=SHAPE, num_slots=num_host_slots)
    )
    disk = ThreadTransfer(source, host_arena, piece_bytes=4096)
    return TieredTransfer(disk, make_link(host_arena, arena), host=host, source=source)


ENGINES["tiered"] = lambda source, arena: tiered(source, arena, num_host_slots=3)
ENGINES["tiered-all-on-host"] = lambda source, arena: tiered(source, arena, num_host_slots=20)
ENGINES["cuda"] = lambda source, arena: tiered(source, arena, num_host_slots=8, make_link=CudaLink)
NAMES = [pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name for name in ENGINES]


@pytest.fixture(params=["packed", "checkpoint"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> SyntheticExperts:
    return write_experts(tmp_path, SHAPE, is_packed=request.param == "packed")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def arena(name: str, source: SyntheticExperts) -> Iterator[SlotArena]:
    device = "cuda" if name == "cuda" else "cpu"
    with SlotArena(len(KEYS), source.views, source.nbytes, device=device) as arena:
        for slot in range(arena.num_slots):
            arena.poison(slot)
        yield arena


@pytest.fixture
def engine(name: str, source: SyntheticExperts, arena: SlotArena) -> Iterator[TransferEngine]:
    engine = ENGINES[name](source, arena)
    yield engine
    engine.close()


def let_arrive(arena: SlotArena) -> None:
    """A device is waited for by its own streams; here the host has to."""
    if arena.device.type == "cuda":
        torch.cuda.synchronize()


def assert_holds(arena: SlotArena, slot: int, source: SyntheticExperts, key: ExpertKey) -> None:
    for name, expected in source.reference(key).items():
        assert torch.equal(arena.view(slot, name).cpu(), expected), (key, name)


def test_waited_copies_hold_exactly_their_experts(
    engine: TransferEngine, source: SyntheticExperts, arena: SlotArena
) -> None:
    transfers = [
        engine.submit(key, slot, Kind.PREFETCH if slot % 3 else Kind.ON_DEMAND)
        for slot, key in enumerate(reversed(KEYS))
    ]
    for transfer in transfers:
        transfer.wait()
        let_arrive(arena)
        assert transfer.done()
        assert_holds(arena, transfer.slot, source, transfer.key)
    let_arrive(arena)
    assert engine.outstanding_bytes() == 0


def test_a_transfer_says_what_it_carries(engine: TransferEngine, source: SyntheticExperts) -> None:
    transfer = engine.submit(KEYS[3], 5, Kind.PREFETCH)
    assert (transfer.key, transfer.slot, transfer.kind) == (KEYS[3], 5, Kind.PREFETCH)
    assert transfer.nbytes == source.layout(KEYS[3]).bytes_read
    transfer.wait()


def test_waiting_again_is_harmless(engine: TransferEngine) -> None:
    transfer = engine.submit(KEYS[0], 0, Kind.ON_DEMAND)
    transfer.wait()
    transfer.wait()
    assert not transfer.cancel(), "a finished copy cannot be cancelled"


def test_a_slot_can_be_overwritten_by_another_expert(
    engine: TransferEngine, source: SyntheticExperts, arena: SlotArena
) -> None:
    for key in KEYS:
        arena.poison(0)
        engine.submit(key, 0, Kind.ON_DEMAND).wait()
        assert_holds(arena, 0, source, key)


def test_an_unknown_expert_fails_in_wait_and_hurts_nobody_else(
    engine: TransferEngine, source: SyntheticExperts, arena: SlotArena
) -> None:
    bad = engine.submit(ExpertKey(9, 9), 0, Kind.ON_DEMAND)
    good = engine.submit(KEYS[1], 1, Kind.ON_DEMAND)
    with pytest.raises(TransferError, match="layer_idx=9"):
        bad.wait()
    good.wait()
    assert_holds(arena, 1, source, KEYS[1])
    let_arrive(arena)
    assert engine.outstanding_bytes() == 0


def test_a_slot_outside_of_the_arena_fails_in_wait(engine: TransferEngine) -> None:
    with pytest.raises(TransferError, match=f"slot {len(KEYS)}"):
        engine.submit(KEYS[0], len(KEYS), Kind.ON_DEMAND).wait()


def test_a_truncated_file_fails_only_the_experts_it_lost(
    engine: TransferEngine, source: SyntheticExperts, arena: SlotArena
) -> None:
    last = KEYS[-1]
    extent = source.layout(last).extents[-1]
    with extent.file.open("r+b") as file:
        file.truncate(extent.offset + extent.length - 1)
    lost = engine.submit(last, 0, Kind.ON_DEMAND)
    kept = engine.submit(KEYS[0], 1, Kind.PREFETCH)
    with pytest.raises(TransferError, match=str(extent.file)) as caught:
        lost.wait()
    assert "wanted" in str(caught.value) and "expert_idx=5" in str(caught.value)
    kept.wait()
    assert_holds(arena, 1, source, KEYS[0])
    let_arrive(arena)
    assert engine.outstanding_bytes() == 0


def test_a_promoted_prefetch_completes(
    engine: TransferEngine, source: SyntheticExperts, arena: SlotArena
) -> None:
    transfers = [engine.submit(key, slot, Kind.PREFETCH) for slot, key in enumerate(KEYS)]
    engine.promote(transfers[-1])
    transfers[-1].wait()
    assert_holds(arena, len(KEYS) - 1, source, KEYS[-1])
    engine.promote(transfers[-1])
    for transfer in transfers:
        transfer.wait()


def test_cancelled_copies_are_done_and_raise(engine: TransferEngine, arena: SlotArena) -> None:
    transfers = [engine.submit(key, slot, Kind.PREFETCH) for slot, key in enumerate(KEYS)]
    for transfer in reversed(transfers):
        if transfer.cancel():
            assert transfer.done()
            assert not transfer.cancel()
            with pytest.raises(TransferError, match="cancelled"):
                transfer.wait()
        else:
            transfer.wait()
    let_arrive(arena)
    assert engine.outstanding_bytes() == 0


def test_closing_leaves_no_waiter_hanging(engine: TransferEngine, arena: SlotArena) -> None:
    transfers = [engine.submit(key, slot, Kind.PREFETCH) for slot, key in enumerate(KEYS)]
    engine.close()
    engine.close()
    assert all(transfer.done() for transfer in transfers)
    let_arrive(arena)
    assert engine.outstanding_bytes() == 0
    with pytest.raises(TransferError, match="closed"):
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND)


def test_bandwidth_is_known_after_the_first_copy(engine: TransferEngine, arena: SlotArena) -> None:
    copy = engine.submit(KEYS[0], 0, Kind.ON_DEMAND)
    copy.wait()
    let_arrive(arena)
    assert copy.done() and engine.bandwidth() > 0.0
    assert not engine.degraded

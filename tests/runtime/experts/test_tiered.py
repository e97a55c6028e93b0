"""Disk, host and device: what is where, in which order, and that no race is possible.

Streams and events are doubles that carry out work in any order they allow. No GPU was involved.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, FakeDeviceArena
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.runtime.acquisition import Acquisition
from outrider.runtime.errors import DeviceLostError, TransferError
from outrider.runtime.experts import slots as slots_module
from outrider.runtime.experts.cache import ExpertCache, Kind
from outrider.runtime.experts.cuda_link import CudaLink
from outrider.runtime.experts.eviction import make_eviction
from outrider.runtime.experts.prefetcher import Prefetcher
from outrider.runtime.experts.slots import SlotArena
from outrider.runtime.experts.tiered import MAX_AHEAD, TieredTransfer
from outrider.runtime.stats import ExpertTraffic
from outrider.runtime.testing import ManualTransfer, SyntheticExperts, write_experts

SHAPE = ModelShape(2, 6, 2, 8, 8, "")
KEYS = [ExpertKey(layer_idx, expert_idx) for layer_idx in range(2) for expert_idx in range(6)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SyntheticExperts:
    return write_experts(tmp_path_factory.mktemp("experts"), SHAPE)


@dataclass
class Device:
    """A card that is none: an arena, streams, a host cache and a disk that obeys."""

    source: SyntheticExperts
    cuda: FakeCuda
    arena: SlotArena
    disk: ManualTransfer
    host: ExpertCache
    engine: TieredTransfer

    def computes(self, slot: int, key: ExpertKey, seen: list[bool]) -> None:
        """Queue a kernel that reads a slot: what it sees when its turn comes is noted."""
        self.cuda.launch(lambda: seen.append(self.source.is_held(key, self.arena, slot)))


def device_of(
    source: SyntheticExperts, *, num_slots: int = 4, host_slots: int = 8, seed: int = 0
) -> Device:
    cuda = FakeCuda(seed)
    arena = SlotArena(num_slots, source.views, source.nbytes)
    for slot in range(num_slots):
        arena.poison(slot)
    host_arena = SlotArena(host_slots, source.views, source.nbytes)
    disk = ManualTransfer(source, host_arena, bandwidth=1e9)
    host = ExpertCache(host_slots, eviction=make_eviction("lfu", shape=SHAPE, num_slots=host_slots))
    link = CudaLink(host_arena, FakeDeviceArena(arena, cuda), cuda=cuda)  # type: ignore[arg-type]
    engine = TieredTransfer(disk, link, host=host, source=source)
    return Device(source, cuda, arena, disk, host, engine)


def test_what_the_host_has_is_not_read_from_disk_again(source: SyntheticExperts) -> None:
    device = device_of(source)
    device.engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
    device.engine.submit(KEYS[1], 1, Kind.ON_DEMAND).wait()
    device.engine.submit(KEYS[0], 2, Kind.ON_DEMAND).wait()
    assert [key for key, _ in device.disk.log] == [KEYS[0], KEYS[1]]
    assert (device.engine.num_from_disk, device.engine.num_from_host) == (2, 1)
    device.engine.close()
    assert source.is_held(KEYS[0], device.arena, 2)


def test_bandwidth_is_that_of_the_way_of_late(source: SyntheticExperts) -> None:
    device = device_of(source)
    device.engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
    device.cuda.run_some(1000)
    device.engine.pump()
    link = device.engine._link.bandwidth()
    assert link > 0.0
    disk = device.disk._bandwidth = link / 3
    assert device.engine.bandwidth() == pytest.approx(1.0 / (1.0 / link + 1.0 / disk))
    for _ in range(500):
        device.engine.submit(KEYS[0], 1, Kind.ON_DEMAND).wait()
        device.cuda.run_some(1000)
        device.engine.pump()
    link = device.engine._link.bandwidth()
    assert device.engine.bandwidth() == pytest.approx(link, rel=0.01)


def test_the_host_keeps_what_the_device_asks_for_most(source: SyntheticExperts) -> None:
    device = device_of(source, host_slots=3)
    for key in (KEYS[0], KEYS[1], KEYS[0], KEYS[0], KEYS[2], KEYS[3], KEYS[0]):
        device.engine.submit(key, 0, Kind.ON_DEMAND).wait()
        device.cuda.run_some(100)
        device.host.check()
    assert [key for key, _ in device.disk.log].count(KEYS[0]) == 1


def test_waiting_holds_up_compute_and_not_the_host(source: SyntheticExperts) -> None:
    device = device_of(source)
    copy = device.engine.submit(KEYS[0], 0, Kind.ON_DEMAND)
    copy.wait()
    assert not copy.done(), "nothing has run on the device yet"
    seen: list[bool] = []
    device.computes(0, KEYS[0], seen)
    device.cuda.run_some(1000)
    assert seen == [True] and copy.done()


def test_the_time_that_compute_waited_for_a_copy_is_told_once_and_no_other(
    source: SyntheticExperts,
) -> None:
    device = device_of(source)
    copy = device.engine.submit(KEYS[0], 0, Kind.ON_DEMAND)
    copy.wait()
    assert device.engine.device_stall_s() == 0.0, "nothing is over yet"
    device.computes(0, KEYS[0], [])
    device.cuda.run_some(1000)
    waited = device.engine.device_stall_s()
    assert waited > 0.0
    assert device.engine.device_stall_s() == 0.0
    copy = device.engine.submit(KEYS[1], 1, Kind.PREFETCH)
    device.disk.complete_all()
    device.engine.pump()
    device.cuda.run_some(1000)
    copy.wait()
    device.computes(1, KEYS[1], [])
    device.cuda.run_some(1000)
    assert device.engine.device_stall_s() == 0.0, "it had arrived before"


def test_a_copy_waits_for_the_slots_last_use(source: SyntheticExperts) -> None:
    for seed in range(30):
        device = device_of(source, seed=seed)
        device.engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        seen: list[bool] = []
        device.computes(0, KEYS[0], seen)
        device.engine.used([0])
        device.engine.submit(KEYS[1], 0, Kind.PREFETCH).wait()
        device.computes(0, KEYS[1], seen)
        device.engine.close()
        device.cuda.run_some(1000)
        assert seen == [True, True]


@pytest.mark.parametrize("left_out", ["last use", "last copy", "ready"])
def test_the_double_notices_what_is_not_ordered(
    source: SyntheticExperts, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    if left_out == "last use":
        monkeypatch.setattr(CudaLink, "used", lambda self, slots: None)
    elif left_out == "ready":
        monkeypatch.setattr("outrider.runtime.experts.cuda_link.CudaCopy.join", lambda self: None)
    races = 0
    for seed in range(30):
        device = device_of(source, seed=seed)
        seen: list[bool] = []
        if left_out == "last copy":
            # Nobody computed with the first: it was given back, and its slot taken again.
            device.engine.submit(KEYS[0], 0, Kind.PREFETCH)
            device.disk.complete_all()
            device.engine.pump()
            device.engine._link._last_copy.clear()  # type: ignore[attr-defined]
            device.engine.submit(KEYS[1], 0, Kind.ON_DEMAND).wait()
            device.cuda.run_some(1000)
            seen = [source.is_held(KEYS[1], device.arena, 0)]
        else:
            for key, kind in ((KEYS[0], Kind.ON_DEMAND), (KEYS[1], Kind.PREFETCH)):
                device.engine.submit(key, 0, kind).wait()
                device.computes(0, key, seen)
                device.engine.used([0])
        device.engine.close()
        device.cuda.run_some(1000)
        races += not all(seen)
    assert races > 0


def test_prefetches_leave_the_link_to_misses(source: SyntheticExperts) -> None:
    device = device_of(source, num_slots=8, host_slots=8)
    for slot in range(5):
        device.engine.submit(KEYS[slot], slot, Kind.PREFETCH)
    device.disk.complete_all()
    device.engine.pump()
    assert len(device.engine._carried) == MAX_AHEAD
    urgent = device.engine.submit(KEYS[5], 5, Kind.ON_DEMAND)
    urgent.wait()
    assert urgent in device.engine._carried, "a miss goes at once"
    device.engine.close()


def test_a_cancelled_prefetch_never_touches_its_slot(source: SyntheticExperts) -> None:
    device = device_of(source)
    copy = device.engine.submit(KEYS[0], 0, Kind.PREFETCH)
    assert copy.cancel() and copy.done()
    with pytest.raises(TransferError, match="cancelled"):
        copy.wait()
    other = device.engine.submit(KEYS[1], 0, Kind.ON_DEMAND)
    other.wait()
    assert not other.cancel(), "the link has it"
    device.engine.close()
    assert source.is_held(KEYS[1], device.arena, 0)
    device.host.check()
    assert device.host.num_loading == 0


def test_what_was_read_and_waits_for_the_link_can_be_cancelled(source: SyntheticExperts) -> None:
    device = device_of(source, num_slots=8, host_slots=8)
    copies = [device.engine.submit(KEYS[slot], slot, Kind.PREFETCH) for slot in range(5)]
    device.disk.complete_all()
    device.engine.pump()
    assert [copy in device.engine._carried for copy in copies] == [True, True, False, False, False]
    assert [copy.cancel() for copy in copies] == [False, False, True, True, True]
    assert all(device.host.lookup(key) is not None for key in KEYS[:5]), "the host keeps them"
    device.engine.close()
    device.host.check()


def test_a_failed_read_fails_the_copy_and_frees_the_host_slot(source: SyntheticExperts) -> None:
    device = device_of(source)
    copy = device.engine.submit(KEYS[0], 0, Kind.ON_DEMAND)
    device.disk.fail(device.disk.pending[0])
    with pytest.raises(TransferError, match="failed by the test"):
        copy.wait()
    assert device.host.num_free == device.host.num_slots
    device.engine.close()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    layers=st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=10),
    num_slots=st.integers(1, 6),
    host_slots=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
def test_every_kernel_sees_its_expert_whatever_the_order_of_streams(
    source: SyntheticExperts, layers: Any, num_slots: int, host_slots: int, seed: int
) -> None:
    device = device_of(source, num_slots=num_slots, host_slots=host_slots, seed=seed)
    cache = ExpertCache(
        num_slots, eviction=make_eviction("layer-lfu", shape=SHAPE, num_slots=num_slots)
    )
    prefetcher = Prefetcher(
        cache, device.engine, shape=SHAPE, nbytes=source.nbytes, mode="off", clock=lambda: 0.0
    )
    seen: list[bool] = []
    ahead: dict[ExpertKey, Any] = {}
    for number, experts in enumerate(layers):
        keys = [ExpertKey(number % 2, expert_idx) for expert_idx in sorted(experts)]
        for key, copy in list(ahead.items()):
            if copy.done() or key in keys:
                copy.wait()
                cache.commit(copy.slot)
                del ahead[key]
        with Acquisition(
            keys,
            cache=cache,
            transfers=device.engine,
            prefetcher=prefetcher,
            traffic=ExpertTraffic(),
        ) as acquisition:
            for wave in acquisition.waves():
                for key, slot in wave:
                    device.computes(slot, key, seen)
                device.cuda.run_some(device.cuda.random.randrange(6))
        wanted = ExpertKey((number + 1) % 2, device.cuda.random.randrange(6))
        if cache.state(wanted) is None:
            slot = cache.reserve(wanted, Kind.PREFETCH)
            if slot is not None:
                ahead[wanted] = device.engine.submit(wanted, slot, Kind.PREFETCH)
        cache.check()
        device.host.check()
    device.engine.close()
    device.cuda.run_some(10_000)
    assert device.cuda.is_idle
    assert len(seen) == sum(map(len, layers)) and all(seen)
    assert not any(entry.num_pins for entry in device.host._entries.values())


def test_fault_34_memory_that_cannot_be_pinned_is_pageable_with_a_warning(
    source: SyntheticExperts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(block: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: out of memory (RLIMIT_MEMLOCK)\nmore")

    monkeypatch.setattr(slots_module.pinning, "lock", refuse)
    with SlotArena(2, source.views, source.nbytes, is_pinned=True) as arena:
        assert "ulimit -l" in caplog.text and "--host-memory" in caplog.text
        arena.block(1)[:4] = b"\1\2\3\4"
        assert arena.bytes_of(1)[:4].tolist() == [1, 2, 3, 4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be pinned here")
def test_without_cuda_memory_stays_pageable_with_a_warning(
    source: SyntheticExperts, caplog: pytest.LogCaptureFixture
) -> None:
    with SlotArena(1, source.views, source.nbytes, is_pinned=True) as arena:
        assert "cannot be pinned" in caplog.text
        arena.block(0)[:2] = b"\1\2"


@pytest.mark.gpu
def test_on_a_card_slots_of_the_host_are_pinned_until_they_go(source: SyntheticExperts) -> None:
    arena = SlotArena(3, source.views, source.nbytes, is_pinned=True)
    assert arena.bytes_of(2).is_pinned()
    arena.close()
    arena.close()


def test_fault_35_an_error_of_the_device_is_the_end_of_it(source: SyntheticExperts) -> None:
    device = device_of(source)
    copy = device.engine.submit(KEYS[0], 0, Kind.ON_DEMAND)
    copy.wait()
    device.cuda.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(DeviceLostError, match="illegal memory access") as caught:
        copy.done()
    assert caught.value.exit_code != 0


@pytest.mark.gpu
def test_copies_on_a_card_hold_their_experts(tmp_path: Path) -> None:
    source = write_experts(tmp_path, SHAPE)
    with (
        SlotArena(4, source.views, source.nbytes, device="cuda") as arena,
        SlotArena(8, source.views, source.nbytes, is_pinned=True) as host_arena,
    ):
        host = ExpertCache(8, eviction=make_eviction("lfu", shape=SHAPE, num_slots=8))
        disk = ManualTransfer(source, host_arena)
        engine = TieredTransfer(disk, CudaLink(host_arena, arena), host=host, source=source)
        for number in range(40):
            key, slot = KEYS[number % len(KEYS)], number % 4
            engine.submit(key, slot, Kind.PREFETCH if number % 3 else Kind.ON_DEMAND).wait()
            for name, expected in source.reference(key).items():
                assert arena.view(slot, name).cpu().equal(expected), (key, name)
            engine.used([slot])
        engine.close()

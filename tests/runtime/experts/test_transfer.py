"""ThreadTransfer: the order of reads, dying threads, closing, the measured bandwidth."""

import errno
import gc
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from outrider.collect.schema import ExpertKey
from outrider.runtime.errors import TransferError
from outrider.runtime.experts.cache import Kind
from outrider.runtime.experts.slots import SlotArena
from outrider.runtime.experts.thread_transfer import ThreadTransfer
from outrider.runtime.experts.transfer import BandwidthMeter
from outrider.runtime.testing import SyntheticExperts, VirtualClock

KEYS = [ExpertKey(0, expert_idx) for expert_idx in range(6)]
PIECE = 4096


def expert_reads(disk: Any, packed: SyntheticExperts) -> list[int]:
    """Which expert each logged read was for (packed files; the probe at offset 0 left out)."""
    offsets = [offset for _, offset in disk.log]
    first = {packed.layout(key).extents[0].offset: key.expert_idx for key in KEYS}
    assert min(first) > 0
    return [first[max(start for start in first if start <= o)] for o in offsets if o >= min(first)]


def test_a_miss_waits_for_at_most_one_piece_of_a_prefetch(
    disk: Any, packed: SyntheticExperts, arena: SlotArena
) -> None:
    pieces = packed.nbytes // PIECE
    assert pieces >= 3
    with ThreadTransfer(packed, arena, num_threads=1, piece_bytes=PIECE, direct=False) as engine:
        gate = disk.answer = disk.gate()
        ahead = [engine.submit(KEYS[index], index, Kind.PREFETCH) for index in (0, 1)]
        assert gate.arrived.acquire(timeout=20)
        needed = [engine.submit(KEYS[index], index, Kind.ON_DEMAND) for index in (2, 3)]
        assert not ahead[0].cancel(), "it was started"
        for _ in range(1 + 2 * pieces):
            gate.allowed.release()
        for transfer in needed:
            transfer.wait()
        assert not ahead[0].done()
        for _ in range(2 * pieces):
            gate.allowed.release()
        for transfer in ahead:
            transfer.wait()
    expected = [0] + [2] * pieces + [3] * pieces + [0] * (pieces - 1) + [1] * pieces
    assert expert_reads(disk, packed) == expected
    assert all(packed.is_held(KEYS[slot], arena, slot) for slot in range(4))


def test_a_promoted_prefetch_goes_behind_the_misses_and_before_other_prefetches(
    disk: Any, packed: SyntheticExperts, arena: SlotArena
) -> None:
    pieces = packed.nbytes // PIECE
    with ThreadTransfer(packed, arena, num_threads=1, piece_bytes=PIECE, direct=False) as engine:
        gate = disk.answer = disk.gate()
        transfers = [engine.submit(KEYS[index], index, Kind.PREFETCH) for index in (0, 1, 2, 3)]
        assert gate.arrived.acquire(timeout=20)
        engine.submit(KEYS[4], 4, Kind.ON_DEMAND)
        engine.promote(transfers[2])
        engine.promote(transfers[0])
        for _ in range(5 * pieces):
            gate.allowed.release()
        for transfer in transfers:
            transfer.wait()
    order = [4] * pieces + [2] * pieces + [0] * (pieces - 1) + [1] * pieces + [3] * pieces
    assert expert_reads(disk, packed) == [0, *order]


def test_a_cancelled_copy_never_touches_its_slot(
    disk: Any, packed: SyntheticExperts, arena: SlotArena
) -> None:
    with ThreadTransfer(packed, arena, num_threads=1) as engine:
        gate = disk.answer = disk.gate()
        first = engine.submit(KEYS[0], 0, Kind.ON_DEMAND)
        assert gate.arrived.acquire(timeout=20)
        queued = engine.submit(KEYS[1], 1, Kind.ON_DEMAND)
        assert queued.cancel()
        assert engine.outstanding_bytes() == packed.nbytes
        for _ in range(9):
            gate.allowed.release()
        first.wait()
    assert bytes(arena.block(1)) == b"\xff" * packed.nbytes


def test_a_failed_copy_is_done_only_when_nothing_writes_to_its_slot(
    disk: Any, packed: SyntheticExperts, arena: SlotArena
) -> None:
    extent = packed.layout(KEYS[1]).extents[0]
    gate = disk.gate()

    def answer(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == extent.offset:
            return gate(fd, buffers, offset)
        raise OSError(errno.ENXIO, "gone")

    with ThreadTransfer(packed, arena, num_threads=2, piece_bytes=PIECE) as engine:
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        disk.answer = answer
        transfer = engine.submit(KEYS[1], 1, Kind.ON_DEMAND)
        assert gate.arrived.acquire(timeout=20)
        while engine.outstanding_bytes() == packed.nbytes:
            threading.Event().wait(0.001)
        assert not transfer.done(), "a read into the slot is still under way"
        gate.allowed.release()
        with pytest.raises(TransferError, match="gone"):
            transfer.wait()


class ThreadDeath(BaseException):
    """What no handler of ordinary errors catches."""


def die(fd: int, buffers: list[memoryview], offset: int) -> int:
    raise ThreadDeath


def test_a_dead_copy_thread_hangs_no_waiter_and_the_others_go_on(
    disk: Any, packed: SyntheticExperts, arena: SlotArena
) -> None:
    with ThreadTransfer(packed, arena, num_threads=2, piece_bytes=1 << 20) as engine:
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        gate = disk.answer = disk.gate(die)
        lost = engine.submit(KEYS[1], 1, Kind.ON_DEMAND)
        assert gate.arrived.acquire(timeout=20)
        gate.allowed.release()
        with pytest.raises(TransferError, match="thread died"):
            lost.wait()
        disk.answer = disk.preadv
        engine.submit(KEYS[1], 1, Kind.PREFETCH).wait()
        assert packed.is_held(KEYS[1], arena, 1)
        assert engine.degraded


def test_without_copy_threads_misses_still_load_and_prefetches_fail(
    disk: Any, packed: SyntheticExperts, arena: SlotArena
) -> None:
    with ThreadTransfer(packed, arena, num_threads=1, piece_bytes=PIECE, verify=True) as engine:
        gate = disk.answer = disk.gate(die)
        lost = engine.submit(KEYS[0], 0, Kind.ON_DEMAND)
        assert gate.arrived.acquire(timeout=20)
        queued = engine.submit(KEYS[1], 1, Kind.PREFETCH)
        gate.allowed.release()
        for transfer in (lost, queued):
            with pytest.raises(TransferError, match="died"):
                transfer.wait()
        disk.answer = disk.preadv
        engine.submit(KEYS[2], 2, Kind.ON_DEMAND).wait()
        assert packed.is_held(KEYS[2], arena, 2)
        with pytest.raises(TransferError, match="no copy thread"):
            engine.submit(KEYS[3], 3, Kind.PREFETCH).wait()
        assert engine.degraded and engine.outstanding_bytes() == 0


def test_a_small_miss_that_no_thread_has_begun_is_read_by_whoever_waits(
    disk: Any, packed: SyntheticExperts, arena: SlotArena
) -> None:
    readers: list[tuple[int, str]] = []

    with ThreadTransfer(packed, arena, num_threads=1, direct=False) as engine:
        gate = disk.gate()

        def answer(fd: int, buffers: list[memoryview], offset: int) -> int:
            name = threading.current_thread().name
            readers.append((offset, name))
            is_copy_thread = name.startswith("outrider-copy")
            return (gate if is_copy_thread else disk.preadv)(fd, buffers, offset)

        disk.answer = answer
        ahead = engine.submit(KEYS[0], 0, Kind.PREFETCH)
        assert gate.arrived.acquire(timeout=20)
        needed = [engine.submit(KEYS[slot], slot, Kind.ON_DEMAND) for slot in (1, 2)]
        late = engine.submit(KEYS[3], 3, Kind.PREFETCH)
        engine.promote(late)
        for transfer in (*needed, late):
            transfer.wait()
        assert not ahead.done() and engine.outstanding_bytes() == packed.nbytes
        gate.allowed.release()
        ahead.wait()
    here = threading.current_thread().name
    offsets = [packed.layout(key).extents[0].offset for key in KEYS]
    assert readers[1:] == [(offset, here) for offset in offsets[1:4]]
    assert all(packed.is_held(KEYS[slot], arena, slot) for slot in range(4))


def test_an_interrupt_while_the_caller_reads_leaves_the_copy_to_the_next_wait(
    disk: Any, packed: SyntheticExperts, arena: SlotArena
) -> None:
    with ThreadTransfer(packed, arena, num_threads=1, direct=False) as engine:
        gate = disk.answer = disk.gate()
        busy = engine.submit(KEYS[0], 0, Kind.ON_DEMAND)
        assert gate.arrived.acquire(timeout=20)

        def interrupted(fd: int, buffers: list[memoryview], offset: int) -> int:
            raise KeyboardInterrupt

        disk.answer = interrupted
        copies = [engine.submit(KEYS[slot], slot, Kind.ON_DEMAND) for slot in (1, 2)]
        with pytest.raises(KeyboardInterrupt):
            copies[0].wait()
        assert not copies[0].done() and not copies[0].cancel(), "it was started"
        disk.answer = disk.preadv
        assert copies[1].cancel()
        copies[0].wait()
        gate.allowed.release()
        busy.wait()
        assert not engine.degraded and engine.outstanding_bytes() == 0
    assert packed.is_held(KEYS[1], arena, 1) and packed.is_held(KEYS[0], arena, 0)


@pytest.mark.parametrize("ending", ["closed", "broken"])
def test_what_the_caller_cannot_read_fails_in_wait(
    disk: Any, packed: SyntheticExperts, arena: SlotArena, ending: str
) -> None:
    engine = ThreadTransfer(packed, arena, num_threads=1, direct=False)
    gate = disk.answer = disk.gate()
    busy = engine.submit(KEYS[0], 0, Kind.ON_DEMAND)
    assert gate.arrived.acquire(timeout=20)
    wrong = KeyboardInterrupt() if ending == "closed" else OSError(errno.ENXIO, "gone")

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise wrong

    disk.answer = failing
    copy = engine.submit(KEYS[1], 1, Kind.ON_DEMAND)
    if ending == "closed":
        with pytest.raises(KeyboardInterrupt):
            copy.wait()
    else:
        with pytest.raises(TransferError, match="gone"):
            copy.wait()
    gate.allowed.release()
    busy.wait()
    engine.close()
    with pytest.raises(TransferError, match=ending if ending == "closed" else "gone"):
        copy.wait()
    assert bytes(arena.block(1)) == b"\xff" * packed.nbytes


def open_files() -> set[str]:
    links = {link.name: link for link in Path("/proc/self/fd").iterdir()}
    # The descriptor that lists the folder is closed again by now.
    return {name for name, link in links.items() if link.exists()}


def test_descriptors_and_threads_are_given_back(
    loose: SyntheticExperts, arena: SlotArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    real_open = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest: opened.append(path) or real_open(path, *rest)
    )
    before = open_files(), threading.active_count()
    with ThreadTransfer(loose, arena, num_threads=3, piece_bytes=PIECE) as engine:
        for slot, key in enumerate(KEYS):
            engine.submit(key, slot, Kind.ON_DEMAND).wait()
        assert threading.active_count() == before[1] + 3
    assert len(opened) <= 4, "two files, opened once for each way of reading"
    assert (open_files(), threading.active_count()) == before


def test_a_closed_engine_is_freed_without_the_collector(
    packed: SyntheticExperts, arena: SlotArena
) -> None:
    # Its buffers take 2 MiB each, and the collector seldom looks at what is old.
    gc.disable()
    try:
        with ThreadTransfer(packed, arena) as engine:
            engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
            engine.submit(KEYS[1], 1, Kind.PREFETCH).wait()
        gone = weakref.ref(engine)
        del engine
        assert gone() is None
    finally:
        gc.enable()


def test_closing_waits_for_the_read_that_is_under_way(
    disk: Any, packed: SyntheticExperts, arena: SlotArena
) -> None:
    engine = ThreadTransfer(packed, arena, num_threads=1, piece_bytes=PIECE, direct=False)
    gate = disk.answer = disk.gate()
    started = engine.submit(KEYS[0], 0, Kind.ON_DEMAND)
    queued = engine.submit(KEYS[1], 1, Kind.ON_DEMAND)
    assert gate.arrived.acquire(timeout=20)
    closing = threading.Thread(target=engine.close)
    closing.start()
    with pytest.raises(TransferError, match="closed"):
        queued.wait()
    assert not started.done()
    gate.allowed.release()
    closing.join(20)
    assert not closing.is_alive()
    with pytest.raises(TransferError, match="closed"):
        started.wait()


@pytest.mark.parametrize(
    "options", [{"num_threads": 0}, {"piece_bytes": 1000}, {"piece_bytes": 0}], ids=str
)
def test_senseless_options_are_refused(
    packed: SyntheticExperts, arena: SlotArena, options: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="multiple of 4096"):
        ThreadTransfer(packed, arena, **options)


def test_bandwidth_counts_only_busy_time_and_overlaps_once() -> None:
    clock = VirtualClock()
    meter = BandwidthMeter(clock)
    for _ in range(5000):
        meter.start()
        clock.advance(0.25e-3)
        meter.start()
        clock.advance(0.5e-3)
        meter.stop(300)
        clock.advance(0.25e-3)
        meter.stop(700)
        clock.advance(1.0)
    assert meter.rate() == pytest.approx(1e6, rel=0.01)


def test_bandwidth_follows_a_link_that_slows_down() -> None:
    clock = VirtualClock()
    meter = BandwidthMeter(clock)
    for nbytes in [1000] * 100 + [100] * 100:
        meter.start()
        clock.advance(0.1)
        meter.stop(nbytes)
    assert meter.rate() == pytest.approx(1000.0, rel=0.01)

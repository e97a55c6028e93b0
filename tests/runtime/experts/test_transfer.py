"""ThreadTransfer at the operating system's door: order of reads, failures, dying threads."""

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.runtime.errors import TransferError
from outrider.runtime.experts.cache import Kind
from outrider.runtime.experts.slots import SlotArena
from outrider.runtime.experts.transfer import BandwidthMeter, ThreadTransfer
from outrider.runtime.testing import SyntheticExperts, VirtualClock, write_experts

SHAPE = ModelShape(
    num_moe_layers=1, num_experts=6, top_k=2, hidden_size=40, expert_size=24, fingerprint=""
)
KEYS = [ExpertKey(0, expert_idx) for expert_idx in range(6)]
PIECE = 4096

Read = Callable[[int, list[memoryview], int], int]


class Disk:
    """Stands at os.preadv: keeps a log of (file name, offset), and lets a test answer a read."""

    def __init__(self, preadv: Read) -> None:
        self.preadv = preadv
        self.log: list[tuple[str, int]] = []
        self.answer: Read = preadv

    def __call__(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self.log.append((Path(f"/proc/self/fd/{fd}").readlink().name, offset))
        return self.answer(fd, buffers, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(os.preadv)
    monkeypatch.setattr(os, "preadv", disk)
    return disk


@pytest.fixture
def source(tmp_path: Path) -> SyntheticExperts:
    return write_experts(tmp_path / "packed", SHAPE)


@pytest.fixture
def loose(tmp_path: Path) -> SyntheticExperts:
    """Experts at odd offsets of two files, as in a checkpoint."""
    return write_experts(tmp_path / "loose", SHAPE, is_packed=False)


@pytest.fixture
def arena(source: SyntheticExperts) -> Iterator[SlotArena]:
    with SlotArena(len(KEYS), source.views, source.nbytes) as arena:
        for slot in range(arena.num_slots):
            arena.poison(slot)
        yield arena


def holds(arena: SlotArena, slot: int, source: SyntheticExperts, key: ExpertKey) -> bool:
    reference = source.reference(key)
    return all(torch.equal(arena.view(slot, name), value) for name, value in reference.items())


class Gate:
    """Blocks reads until each is let through; tells when one has arrived."""

    def __init__(self, preadv: Read) -> None:
        self.preadv = preadv
        self.arrived = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)

    def __call__(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self.arrived.release()
        assert self.allowed.acquire(timeout=20)
        return self.preadv(fd, buffers, offset)


def expert_reads(disk: Disk, source: SyntheticExperts) -> list[int]:
    """Which expert each logged read was for (packed files; the probe at offset 0 left out)."""
    offsets = [offset for _, offset in disk.log]
    first = {source.layout(key).extents[0].offset: key.expert_idx for key in KEYS}
    assert min(first) > 0
    return [first[max(start for start in first if start <= o)] for o in offsets if o >= min(first)]


def test_a_miss_waits_for_at_most_one_piece_of_a_prefetch(
    disk: Disk, source: SyntheticExperts, arena: SlotArena
) -> None:
    pieces = source.nbytes // PIECE
    assert pieces >= 3
    with ThreadTransfer(source, arena, num_threads=1, piece_bytes=PIECE, direct=False) as engine:
        gate = disk.answer = Gate(disk.preadv)
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
    assert expert_reads(disk, source) == expected
    assert all(holds(arena, slot, source, KEYS[slot]) for slot in range(4))


def test_a_promoted_prefetch_goes_behind_the_misses_and_before_other_prefetches(
    disk: Disk, source: SyntheticExperts, arena: SlotArena
) -> None:
    pieces = source.nbytes // PIECE
    with ThreadTransfer(source, arena, num_threads=1, piece_bytes=PIECE, direct=False) as engine:
        gate = disk.answer = Gate(disk.preadv)
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
    assert expert_reads(disk, source) == [0, *order]


def test_a_cancelled_copy_never_touches_its_slot(
    disk: Disk, source: SyntheticExperts, arena: SlotArena
) -> None:
    with ThreadTransfer(source, arena, num_threads=1) as engine:
        gate = disk.answer = Gate(disk.preadv)
        first = engine.submit(KEYS[0], 0, Kind.ON_DEMAND)
        assert gate.arrived.acquire(timeout=20)
        queued = engine.submit(KEYS[1], 1, Kind.ON_DEMAND)
        assert queued.cancel()
        assert engine.outstanding_bytes() == source.nbytes
        for _ in range(9):
            gate.allowed.release()
        first.wait()
    assert bytes(arena.block(1)) == b"\xff" * source.nbytes


@pytest.mark.parametrize("direct", [None, False])
@pytest.mark.parametrize("longest", [1, 700, 4096, 5000])
def test_short_reads_and_interruptions_are_continued(
    disk: Disk, loose: SyntheticExperts, arena: SlotArena, direct: bool | None, longest: int
) -> None:
    def answer(fd: int, buffers: list[memoryview], offset: int) -> int:
        if len(disk.log) % 3 == 0:
            raise InterruptedError(errno.EINTR, "interrupted")
        return min(disk.preadv(fd, buffers, offset), longest)

    with ThreadTransfer(loose, arena, piece_bytes=PIECE, direct=direct, verify=True) as engine:
        disk.answer = answer
        engine.submit(KEYS[2], 3, Kind.ON_DEMAND).wait()
    assert holds(arena, 3, loose, KEYS[2])


@pytest.mark.parametrize("direct", [None, False])
def test_a_read_error_is_tried_again_twice(
    disk: Disk, loose: SyntheticExperts, arena: SlotArena, direct: bool | None
) -> None:
    failures = iter([errno.EIO, errno.EIO])

    def answer(fd: int, buffers: list[memoryview], offset: int) -> int:
        if (number := next(failures, None)) is not None:
            raise OSError(number, os.strerror(number))
        return disk.preadv(fd, buffers, offset)

    with ThreadTransfer(loose, arena, num_threads=1, direct=direct) as engine:
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        disk.answer = answer
        engine.submit(KEYS[1], 1, Kind.ON_DEMAND).wait()
    assert holds(arena, 1, loose, KEYS[1])


@pytest.mark.parametrize(("number", "num_tries"), [(errno.EIO, 3), (errno.EACCES, 1)])
def test_a_lasting_read_error_costs_only_its_transfer(
    disk: Disk, loose: SyntheticExperts, arena: SlotArena, number: int, num_tries: int
) -> None:
    def answer(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(number, os.strerror(number))

    with ThreadTransfer(loose, arena, num_threads=1) as engine:
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        disk.answer, disk.log = answer, []
        broken = engine.submit(KEYS[1], 1, Kind.ON_DEMAND)
        with pytest.raises(TransferError, match=os.strerror(number)) as caught:
            broken.wait()
        extent = loose.layout(KEYS[1]).extents[0]
        for part in (str(extent.file), f"offset {extent.offset}", "expert_idx=1"):
            assert part in str(caught.value)
        assert len(disk.log) == num_tries
        disk.answer = disk.preadv
        engine.submit(KEYS[1], 1, Kind.ON_DEMAND).wait()
        assert holds(arena, 1, loose, KEYS[1])
        assert not engine.degraded


def test_a_failed_copy_is_done_only_when_nothing_writes_to_its_slot(
    disk: Disk, source: SyntheticExperts, arena: SlotArena
) -> None:
    extent = source.layout(KEYS[1]).extents[0]
    gate = Gate(disk.preadv)

    def answer(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == extent.offset:
            return gate(fd, buffers, offset)
        raise OSError(errno.ENXIO, "gone")

    with ThreadTransfer(source, arena, num_threads=2, piece_bytes=PIECE) as engine:
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        disk.answer = answer
        transfer = engine.submit(KEYS[1], 1, Kind.ON_DEMAND)
        assert gate.arrived.acquire(timeout=20)
        while engine.outstanding_bytes() > PIECE:
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
    disk: Disk, source: SyntheticExperts, arena: SlotArena
) -> None:
    with ThreadTransfer(source, arena, num_threads=2, piece_bytes=1 << 20) as engine:
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        disk.answer = die
        lost = engine.submit(KEYS[1], 1, Kind.ON_DEMAND)
        with pytest.raises(TransferError, match="thread died"):
            lost.wait()
        disk.answer = disk.preadv
        engine.submit(KEYS[1], 1, Kind.PREFETCH).wait()
        assert holds(arena, 1, source, KEYS[1])
        assert engine.degraded


def test_without_copy_threads_misses_still_load_and_prefetches_fail(
    disk: Disk, source: SyntheticExperts, arena: SlotArena
) -> None:
    with ThreadTransfer(source, arena, num_threads=1, piece_bytes=PIECE, verify=True) as engine:
        gate = Gate(die)
        disk.answer = gate
        lost = engine.submit(KEYS[0], 0, Kind.ON_DEMAND)
        assert gate.arrived.acquire(timeout=20)
        queued = engine.submit(KEYS[1], 1, Kind.PREFETCH)
        gate.allowed.release()
        for transfer in (lost, queued):
            with pytest.raises(TransferError, match="died"):
                transfer.wait()
        disk.answer = disk.preadv
        engine.submit(KEYS[2], 2, Kind.ON_DEMAND).wait()
        assert holds(arena, 2, source, KEYS[2])
        with pytest.raises(TransferError, match="no copy thread"):
            engine.submit(KEYS[3], 3, Kind.PREFETCH).wait()
        assert engine.degraded and engine.outstanding_bytes() == 0


def flip_bit(source: SyntheticExperts, key: ExpertKey) -> None:
    extent = source.layout(key).extents[-1]
    with extent.file.open("r+b") as file:
        file.seek(extent.offset + 17)
        byte = file.read(1)[0]
        file.seek(extent.offset + 17)
        file.write(bytes([byte ^ 0x10]))


def test_a_flipped_bit_is_caught_when_verifying(loose: SyntheticExperts, arena: SlotArena) -> None:
    flip_bit(loose, KEYS[4])
    with ThreadTransfer(loose, arena, piece_bytes=PIECE, verify=True) as engine:
        engine.submit(KEYS[3], 3, Kind.ON_DEMAND).wait()
        with pytest.raises(TransferError, match=r"checksum .*down\.bin.*damaged") as caught:
            engine.submit(KEYS[4], 4, Kind.PREFETCH).wait()
        assert "expert_idx=4" in str(caught.value)
        loose.checksums.pop(KEYS[4])
        engine.submit(KEYS[4], 4, Kind.ON_DEMAND).wait()
    with ThreadTransfer(loose, arena) as engine:
        engine.submit(KEYS[4], 4, Kind.ON_DEMAND).wait()


def test_a_missing_file_fails_until_it_is_there(source: SyntheticExperts, arena: SlotArena) -> None:
    file = source.layout(KEYS[0]).extents[0].file
    away = file.rename(file.with_suffix(".away"))
    with ThreadTransfer(source, arena) as engine:
        with pytest.raises(TransferError, match=f"{file}.*No such file"):
            engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        away.rename(file)
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
    assert holds(arena, 0, source, KEYS[0])


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_a_file_that_goes_away_while_running_stays_readable(
    source: SyntheticExperts, arena: SlotArena, change: str
) -> None:
    file = source.layout(KEYS[0]).extents[0].file
    with ThreadTransfer(source, arena, verify=True) as engine:
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        if change == "deleted":
            file.unlink()
        else:
            beside = file.with_suffix(".new")
            beside.write_bytes(bytes(file.stat().st_size))
            beside.replace(file)
        engine.submit(KEYS[5], 5, Kind.ON_DEMAND).wait()
    assert holds(arena, 5, source, KEYS[5])


def test_a_file_without_permission_is_named(source: SyntheticExperts, arena: SlotArena) -> None:
    file = source.layout(KEYS[0]).extents[0].file
    file.chmod(0)
    is_root = os.geteuid() == 0
    with ThreadTransfer(source, arena) as engine:
        if is_root:
            os.seteuid(65534)
        try:
            with pytest.raises(TransferError, match=f"{file}.*Permission denied"):
                engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        finally:
            if is_root:
                os.seteuid(0)


@pytest.mark.parametrize("refusal", ["open", "read"])
def test_direct_reads_fall_back_unless_demanded(
    source: SyntheticExperts,
    arena: SlotArena,
    monkeypatch: pytest.MonkeyPatch,
    refusal: str,
) -> None:
    directs: set[int] = set()
    real_open, real_preadv = os.open, os.preadv

    def refuse_open(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT and refusal == "open":
            raise OSError(errno.EINVAL, "no direct reads here")
        descriptor = real_open(path, flags, *rest)
        (directs.add if flags & os.O_DIRECT else directs.discard)(descriptor)
        return descriptor

    def refuse_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fd in directs:
            raise OSError(errno.EINVAL, "no direct reads here")
        return real_preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "open", refuse_open)
    monkeypatch.setattr(os, "preadv", refuse_read)
    with ThreadTransfer(source, arena) as engine:
        engine.submit(KEYS[1], 1, Kind.ON_DEMAND).wait()
        assert holds(arena, 1, source, KEYS[1])
    with (
        ThreadTransfer(source, arena, direct=True) as engine,
        pytest.raises(TransferError, match="no direct reads"),
    ):
        engine.submit(KEYS[2], 2, Kind.ON_DEMAND).wait()


def test_aligned_experts_are_read_straight_into_their_slots(
    disk: Disk, source: SyntheticExperts, arena: SlotArena
) -> None:
    addresses: list[int] = []

    def answer(fd: int, buffers: list[memoryview], offset: int) -> int:
        addresses.append(ctypes.addressof(ctypes.c_char.from_buffer(buffers[0])))
        return disk.preadv(fd, buffers, offset)

    with ThreadTransfer(source, arena, piece_bytes=PIECE) as engine:
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        disk.answer = answer
        engine.submit(KEYS[1], 1, Kind.ON_DEMAND).wait()
    start = arena.view(1, "gate_up_proj").data_ptr()
    assert sorted(addresses) == list(range(start, start + source.nbytes, PIECE))


def resident_pages(file: Path) -> int:
    """Pages of `file` in the page cache, as mincore says."""
    size = file.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    with file.open("r+b") as handle, mmap.mmap(handle.fileno(), size) as mapping:
        anchor = ctypes.c_char.from_buffer(mapping)
        vector = (ctypes.c_ubyte * pages)()
        status = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), vector
        )
        del anchor
        assert status == 0
        return sum(page & 1 for page in vector)


@pytest.mark.parametrize("direct", [None, False])
def test_reading_leaves_nothing_in_the_page_cache(
    loose: SyntheticExperts, arena: SlotArena, direct: bool | None
) -> None:
    files = {extent.file for key in KEYS for extent in loose.layout(key).extents}
    for file in files:
        descriptor = os.open(file, os.O_RDWR)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    if any(map(resident_pages, files)):
        pytest.skip("this file system keeps its pages")
    with ThreadTransfer(loose, arena, direct=direct, piece_bytes=PIECE) as engine:
        for slot in (0, 2, 5):
            engine.submit(KEYS[slot], slot, Kind.ON_DEMAND).wait()
    assert [resident_pages(file) for file in files] == [0] * len(files)


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


def test_closing_waits_for_the_read_that_is_under_way(
    disk: Disk, source: SyntheticExperts, arena: SlotArena
) -> None:
    engine = ThreadTransfer(source, arena, num_threads=1, piece_bytes=PIECE, direct=False)
    gate = disk.answer = Gate(disk.preadv)
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
    source: SyntheticExperts, arena: SlotArena, options: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="multiple of 4096"):
        ThreadTransfer(source, arena, **options)


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

"""Reading experts at the operating system's door: short reads, errors, files that change."""

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from outrider.collect.schema import ExpertKey
from outrider.runtime.errors import TransferError
from outrider.runtime.experts.cache import Kind
from outrider.runtime.experts.slots import SlotArena
from outrider.runtime.experts.thread_transfer import ThreadTransfer
from outrider.runtime.testing import SyntheticExperts

KEYS = [ExpertKey(0, expert_idx) for expert_idx in range(6)]
PIECE = 4096


@pytest.mark.parametrize("direct", [None, False])
@pytest.mark.parametrize("longest", [1, 700, 4096, 5000])
def test_short_reads_and_interruptions_are_continued(
    disk: Any, loose: SyntheticExperts, arena: SlotArena, direct: bool | None, longest: int
) -> None:
    def answer(fd: int, buffers: list[memoryview], offset: int) -> int:
        if len(disk.log) % 3 == 0:
            raise InterruptedError(errno.EINTR, "interrupted")
        return min(disk.preadv(fd, buffers, offset), longest)

    with ThreadTransfer(loose, arena, piece_bytes=PIECE, direct=direct, verify=True) as engine:
        disk.answer = answer
        engine.submit(KEYS[2], 3, Kind.ON_DEMAND).wait()
    assert loose.is_held(KEYS[2], arena, 3)


@pytest.mark.parametrize("direct", [None, False])
def test_a_read_error_is_tried_again_twice(
    disk: Any, loose: SyntheticExperts, arena: SlotArena, direct: bool | None
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
    assert loose.is_held(KEYS[1], arena, 1)


def test_a_read_that_gets_on_may_fail_more_often(
    disk: Any, loose: SyntheticExperts, arena: SlotArena
) -> None:
    def answer(fd: int, buffers: list[memoryview], offset: int) -> int:
        if len(disk.log) % 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return min(disk.preadv(fd, buffers, offset), 2000)

    with ThreadTransfer(loose, arena, num_threads=1, direct=False) as engine:
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        disk.answer, disk.log = answer, []
        engine.submit(KEYS[1], 1, Kind.ON_DEMAND).wait()
        assert len(disk.log) > 12
    assert loose.is_held(KEYS[1], arena, 1)


@pytest.mark.parametrize(("number", "num_tries"), [(errno.EIO, 3), (errno.EACCES, 1)])
def test_a_lasting_read_error_costs_only_its_transfer(
    disk: Any, loose: SyntheticExperts, arena: SlotArena, number: int, num_tries: int
) -> None:
    def answer(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(number, os.strerror(number))

    with ThreadTransfer(loose, arena, num_threads=1) as engine:
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        disk.answer, disk.log = answer, []
        broken = engine.submit(KEYS[1], 1, Kind.ON_DEMAND)
        with pytest.raises(TransferError, match=os.strerror(number)) as caught:
            broken.wait()
        extent = min(loose.layout(KEYS[1]).extents, key=lambda one: one.file)
        for part in (str(extent.file), f"offset {extent.offset}", "expert_idx=1"):
            assert part in str(caught.value)
        assert len(disk.log) == num_tries
        disk.answer = disk.preadv
        engine.submit(KEYS[1], 1, Kind.ON_DEMAND).wait()
        assert loose.is_held(KEYS[1], arena, 1)
        assert not engine.degraded


def flip_bit(packed: SyntheticExperts, key: ExpertKey) -> None:
    extent = packed.layout(key).extents[-1]
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


def test_a_missing_file_fails_until_it_is_there(packed: SyntheticExperts, arena: SlotArena) -> None:
    file = packed.layout(KEYS[0]).extents[0].file
    away = file.rename(file.with_suffix(".away"))
    with ThreadTransfer(packed, arena) as engine:
        with pytest.raises(TransferError, match=f"{file}.*No such file"):
            engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        away.rename(file)
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
    assert packed.is_held(KEYS[0], arena, 0)


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_a_file_that_goes_away_while_running_stays_readable(
    packed: SyntheticExperts, arena: SlotArena, change: str
) -> None:
    file = packed.layout(KEYS[0]).extents[0].file
    with ThreadTransfer(packed, arena, verify=True) as engine:
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        if change == "deleted":
            file.unlink()
        else:
            beside = file.with_suffix(".new")
            beside.write_bytes(bytes(file.stat().st_size))
            beside.replace(file)
        engine.submit(KEYS[5], 5, Kind.ON_DEMAND).wait()
    assert packed.is_held(KEYS[5], arena, 5)


def test_a_file_without_permission_is_named(packed: SyntheticExperts, arena: SlotArena) -> None:
    file = packed.layout(KEYS[0]).extents[0].file
    file.chmod(0)
    is_root = os.geteuid() == 0
    with ThreadTransfer(packed, arena) as engine:
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
    packed: SyntheticExperts,
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
    with ThreadTransfer(packed, arena) as engine:
        engine.submit(KEYS[1], 1, Kind.ON_DEMAND).wait()
        assert packed.is_held(KEYS[1], arena, 1)
    with (
        ThreadTransfer(packed, arena, direct=True) as engine,
        pytest.raises(TransferError, match="no direct reads"),
    ):
        engine.submit(KEYS[2], 2, Kind.ON_DEMAND).wait()


def test_aligned_experts_are_read_straight_into_their_slots(
    disk: Any, packed: SyntheticExperts, arena: SlotArena
) -> None:
    addresses: list[int] = []

    def answer(fd: int, buffers: list[memoryview], offset: int) -> int:
        addresses.append(ctypes.addressof(ctypes.c_char.from_buffer(buffers[0])))
        return disk.preadv(fd, buffers, offset)

    with ThreadTransfer(packed, arena, piece_bytes=PIECE) as engine:
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        disk.answer = answer
        engine.submit(KEYS[1], 1, Kind.ON_DEMAND).wait()
    start = arena.view(1, "gate_up_proj").data_ptr()
    assert sorted(addresses) == list(range(start, start + packed.nbytes, PIECE))


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

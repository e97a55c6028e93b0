"""Reads pieces of weight files into memory: past the page cache where the file system allows it.

Knows files, alignment and retries; knows neither experts nor slots nor queues.
"""

import errno
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import TransferError
from .layout import BLOCK_ALIGN, align_up
from .memory import map_memory
from .pieces import Halt, NativePieces, Piece, native_call

MAX_RETRIES = 2
RETRIED_ERRNOS = frozenset({errno.EIO, errno.EAGAIN})
FIRST_BACKOFF_S = 0.01

LARGE_PAGE = 2 << 20


@dataclass(frozen=True, slots=True)
class _OpenFile:
    buffered: int
    direct: int | None


@dataclass(slots=True)
class ReadPlan:
    """The pieces of one expert for one reader, which adds what its native call takes."""

    pieces: Sequence[Piece]
    native: NativePieces | None = field(default=None, init=False)


class PieceReader(Protocol):
    """What copy threads read with; see FileReader, whose place another may take."""

    def read_run(
        self, plan: ReadPlan, run: range, *, slot: memoryview, bounce: memoryview, halt: Halt
    ) -> int: ...

    def close(self) -> None: ...


class FileReader:
    """Keeps each file open from its first read on, so that a file renamed away stays readable.

    `direct`: None tries O_DIRECT with one aligned read and falls back to buffered reads whose pages
    are given back at once (the page cache must not hide the memory budget); True refuses the
    fallback; False never tries. Thread-safe; `stopping` cuts short the pause before a retry.
    """

    def __init__(self, *, direct: bool | None, stopping: threading.Event) -> None:
        self._direct = direct
        self._stopping = stopping
        self._lock = threading.Lock()
        self._files: dict[Path, _OpenFile] = {}

    def read_run(
        self, plan: ReadPlan, run: range, *, slot: memoryview, bounce: memoryview, halt: Halt
    ) -> int:
        """Read a run of a plan's pieces into the block of a slot; blocks on the disk.

        Returns how many were read: all, or those before `halt` was seen to be set. `bounce` is a
        page-aligned buffer of the calling thread, at least the longest piece plus two blocks.
        Raises TransferError naming file and offset: if a file cannot be opened, ends early, or
        still fails after MAX_RETRIES. Files stay open from the first read on.
        """
        if halt.value:
            return 0  # closed, perhaps: no file is opened again
        at = run.start
        native = plan.native or self._native(plan)
        while at < run.stop and not halt.value:
            if native is not None:
                count, is_broken = native.read(
                    range(at, run.stop), slot=slot, bounce=bounce, halt=halt
                )
                at += count
                if not is_broken:
                    continue
            # One by one, and again: what did not come whole, or all where there is no native call.
            self.read(plan.pieces[at], slot, bounce=bounce)
            at += 1
        return at - run.start

    def _native(self, plan: ReadPlan) -> NativePieces | None:
        call = native_call()
        if call is None:
            return None
        try:
            opened = [self._open(piece.file) for piece in plan.pieces]
        except OSError:
            return None  # whoever reads that piece says so
        descriptors = [(-1 if one.direct is None else one.direct, one.buffered) for one in opened]
        plan.native = NativePieces(call, plan.pieces, descriptors)
        return plan.native

    def read(self, piece: Piece, slot: memoryview, *, bounce: memoryview) -> None:
        """Read one piece into the block of a slot, with retries; else as `read_run`.

        It goes straight there if it is one part, aligned to BLOCK_ALIGN in the file and in the slot
        where reads are direct.
        """
        try:
            opened = self._open(piece.file)
            skip = piece.offset % BLOCK_ALIGN
            start, length = piece.parts[0]
            is_aligned = not (skip or piece.length % BLOCK_ALIGN or start % BLOCK_ALIGN)
            if len(piece.parts) == 1 and (opened.direct is None or is_aligned):
                target = slot[start : start + length]
                got = self._fill(opened, target, piece.offset, num_wanted=piece.length)
            else:
                window = bounce[: align_up(skip + piece.length, BLOCK_ALIGN)]
                wanted = skip + piece.length
                got = self._fill(opened, window, piece.offset - skip, num_wanted=wanted) - skip
                if got >= piece.length:
                    _scatter(window[skip:wanted], slot, piece.parts)
        except OSError as error:
            raise TransferError(
                f"{piece.file}: reading {piece.length} bytes at offset {piece.offset} failed: "
                f"{error.strerror or error}"
            ) from error
        if got < piece.length:
            raise TransferError(
                f"{piece.file}: wanted {piece.length} bytes at offset {piece.offset}, got "
                f"{max(got, 0)}: the file was truncated or replaced"
            )

    def _fill(self, opened: _OpenFile, buffer: memoryview, offset: int, *, num_wanted: int) -> int:
        is_direct = opened.direct is not None
        descriptor = opened.buffered if opened.direct is None else opened.direct
        got = num_failed = 0
        while got < num_wanted:
            try:
                count = os.preadv(descriptor, [buffer[got:]], offset + got)
            except InterruptedError:
                continue
            except OSError as error:
                num_failed += 1
                if error.errno not in RETRIED_ERRNOS or num_failed > MAX_RETRIES:
                    raise
                self._stopping.wait(FIRST_BACKOFF_S * 4 ** (num_failed - 1))
                continue
            if count == 0:
                break
            got += count
            num_failed = 0
            if is_direct and got < num_wanted and got % BLOCK_ALIGN:
                # A direct read cannot go on from the middle of a block.
                is_direct, descriptor = False, opened.buffered
        if not is_direct:
            # Pages that are covered in part would be kept.
            start = offset - offset % BLOCK_ALIGN
            length = align_up(offset + num_wanted, BLOCK_ALIGN) - start
            os.posix_fadvise(opened.buffered, start, length, os.POSIX_FADV_DONTNEED)
        return got

    def _open(self, path: Path) -> _OpenFile:
        with self._lock:
            opened = self._files.get(path)
            if opened is None:
                buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    # Read-ahead would fill the page cache with the neighbours of what is read.
                    os.posix_fadvise(buffered, 0, 0, os.POSIX_FADV_RANDOM)
                    opened = _OpenFile(buffered, self._open_direct(path))
                except OSError:
                    os.close(buffered)
                    raise
                self._files[path] = opened
            return opened

    def _open_direct(self, path: Path) -> int | None:
        if self._direct is False:
            return None
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            if self._direct:
                raise
            return None
        try:
            # Some file systems accept the flag and refuse the read.
            os.preadv(descriptor, [memoryview(mmap.mmap(-1, BLOCK_ALIGN))], 0)
        except OSError:
            os.close(descriptor)
            if self._direct:
                raise
            return None
        return descriptor

    def close(self) -> None:
        """Close every file; the caller sees to it that no read is under way."""
        with self._lock:
            for opened in self._files.values():
                os.close(opened.buffered)
                if opened.direct is not None:
                    os.close(opened.direct)
            self._files.clear()


def _scatter(window: memoryview, slot: memoryview, parts: Sequence[tuple[int, int]]) -> None:
    # numpy copies without the interpreter lock, a memoryview would hold it.
    source, target, done = np.frombuffer(window, np.uint8), np.frombuffer(slot, np.uint8), 0
    for start, length in parts:
        np.copyto(target[start : start + length], source[done : done + length])
        done += length


def bounce_buffer(piece_bytes: int) -> memoryview:
    """What a thread needs to read pieces of `piece_bytes` at any offset; page-aligned."""
    # Rounded up so that one large page can hold it.
    return memoryview(map_memory(align_up(piece_bytes + 2 * BLOCK_ALIGN, LARGE_PAGE)))

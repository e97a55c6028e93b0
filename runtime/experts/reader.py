"""Reads pieces of weight files into memory: past the page cache where the file system allows it.

Knows files, alignment and retries; knows neither experts nor slots nor queues.
"""

import errno
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import TransferError
from .layout import BLOCK_ALIGN, Extent, align_up
from .memory import map_memory

MAX_RETRIES = 2
RETRIED_ERRNOS = frozenset({errno.EIO, errno.EAGAIN})
FIRST_BACKOFF_S = 0.01

LARGE_PAGE = 2 << 20


def split_extents(extents: Sequence[Extent], piece_bytes: int) -> list[Extent]:
    """Cut extents at multiples of BLOCK_ALIGN in the file, into pieces of at most `piece_bytes`."""
    pieces = []
    for extent in extents:
        done = 0
        while done < extent.length:
            start = extent.offset + done
            length = min(piece_bytes - start % BLOCK_ALIGN, extent.length - done)
            pieces.append(Extent(extent.file, start, length, extent.slot_offset + done))
            done += length
    return pieces


@dataclass(frozen=True, slots=True)
class _OpenFile:
    buffered: int
    direct: int | None


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

    def read(self, piece: Extent, target: memoryview, *, bounce: memoryview) -> None:
        """Fill `target` with the piece's bytes; blocks on the disk.

        `bounce` is a page-aligned buffer of the calling thread, at least the piece's length plus
        two blocks. A piece goes straight into `target` if it is aligned to BLOCK_ALIGN in the
        file and in the slot. Raises TransferError naming file and offset: if the file cannot be
        opened, ends early, or still fails after MAX_RETRIES.
        """
        try:
            opened = self._open(piece.file)
            skip = piece.offset % BLOCK_ALIGN
            is_straight = not (
                skip or piece.length % BLOCK_ALIGN or piece.slot_offset % BLOCK_ALIGN
            )
            if opened.direct is None or is_straight:
                got = self._fill(opened, target, piece.offset, num_wanted=piece.length)
            else:
                window = bounce[: align_up(skip + piece.length, BLOCK_ALIGN)]
                wanted = skip + piece.length
                got = self._fill(opened, window, piece.offset - skip, num_wanted=wanted) - skip
                if got >= piece.length:
                    # numpy copies without the interpreter lock, a memoryview would hold it.
                    np.copyto(
                        np.frombuffer(target, np.uint8),
                        np.frombuffer(window, np.uint8)[skip:wanted],
                    )
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


def bounce_buffer(piece_bytes: int) -> memoryview:
    """What a thread needs to read pieces of `piece_bytes` at any offset; page-aligned."""
    # Rounded up so that one large page can hold it.
    return memoryview(map_memory(align_up(piece_bytes + 2 * BLOCK_ALIGN, LARGE_PAGE)))

"""An expert's bytes as pieces, each a contiguous read, and the native call for a run of them.

Knows file ranges and places in a slot; opens no file and decides nothing.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .compiled import compiled
from .layout import BLOCK_ALIGN, Extent

Halt = ctypes.c_int32
"""Not 0: whoever reads a run of pieces stops before the next one. Set by any thread."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` bytes of `file` from `offset`. `parts` are where they belong, in the file's order:
    (offset in the slot block, length)."""

    file: Path
    offset: int
    length: int
    parts: tuple[tuple[int, int], ...]


def split_extents(extents: Sequence[Extent], piece_bytes: int) -> list[Piece]:
    """Pieces of at most `piece_bytes`, cut at multiples of BLOCK_ALIGN in the file.

    Extents that follow each other in a file are read as one, since a disk takes as long for a few
    KiB as for dozens; a checkpoint's projections of one expert mostly do, in another order.
    """
    pieces: list[Piece] = []
    ordered = sorted(extents, key=lambda extent: (extent.file, extent.offset))
    start = 0
    for index, extent in enumerate(ordered):
        following = ordered[index + 1] if index + 1 < len(ordered) else None
        end = extent.offset + extent.length
        if following is None or (following.file, following.offset) != (extent.file, end):
            pieces += _cut(ordered[start : index + 1], piece_bytes)
            start = index + 1
    return pieces


def _cut(extents: Sequence[Extent], piece_bytes: int) -> list[Piece]:
    """Pieces of extents that follow each other."""
    pieces = []
    offset, end = extents[0].offset, extents[-1].offset + extents[-1].length
    while offset < end:
        length = min(piece_bytes - offset % BLOCK_ALIGN, end - offset)
        parts = []
        for extent in extents:
            first = max(offset, extent.offset)
            last = min(offset + length, extent.offset + extent.length)
            if first < last:
                parts.append((extent.slot_offset + first - extent.offset, last - first))
        pieces.append(Piece(extents[0].file, offset, length, tuple(parts)))
        offset += length
    return pieces


class _Part(ctypes.Structure):
    _fields_ = (("slot_offset", ctypes.c_int64), ("length", ctypes.c_int64))


class _Piece(ctypes.Structure):
    _fields_ = (
        ("offset", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("parts", ctypes.POINTER(_Part)),
        ("num_parts", ctypes.c_int64),
        ("direct", ctypes.c_int32),
        ("buffered", ctypes.c_int32),
    )


class NativePieces:
    """Pieces as the native call takes them.

    `descriptors` are each piece's (direct or -1, buffered), open for as long as this is used.
    """

    def __init__(
        self, call: Callable[..., int], pieces: Sequence[Piece], descriptors: list[tuple[int, int]]
    ) -> None:
        self._call = call
        self._size = ctypes.sizeof(_Piece)
        self._pieces = (_Piece * len(pieces))()
        for native, piece, (direct, buffered) in zip(
            self._pieces, pieces, descriptors, strict=True
        ):
            parts = (_Part * len(piece.parts))(*piece.parts)
            native.offset, native.length = piece.offset, piece.length
            native.parts, native.num_parts = parts, len(piece.parts)
            native.direct, native.buffered = direct, buffered

    def read(
        self, run: range, *, slot: memoryview, bounce: memoryview, halt: Halt
    ) -> tuple[int, bool]:
        """Read a run of the pieces; blocks on the disk without the interpreter's lock.

        How many were read, and whether the one behind them was tried and did not come whole.
        """
        count = self._call(
            ctypes.byref(self._pieces, run.start * self._size),
            len(run),
            ctypes.byref(ctypes.c_char.from_buffer(slot)),
            ctypes.byref(ctypes.c_char.from_buffer(bounce)),
            ctypes.byref(halt),
        )
        return (count, False) if count >= 0 else (-1 - count, True)


@cache
def native_call() -> Callable[..., int] | None:
    """The native call, or None where installation built none: pieces are then read one by one."""
    library = compiled("_pieces")
    if library is None:
        return None
    call = library.outrider_read_pieces
    pointer = ctypes.c_void_p
    call.argtypes = [pointer, ctypes.c_int64, pointer, pointer, pointer]
    call.restype = ctypes.c_int64
    return call  # type: ignore[no-any-return]

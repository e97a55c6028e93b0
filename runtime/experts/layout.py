"""Where one expert's bytes lie: extents in files, and named views inside one aligned slot block.

Knows no caches, no transfers and no model family; opens no file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ...collect.schema import ExpertKey, ModelShape

if TYPE_CHECKING:
    import torch

BLOCK_ALIGN = 4096
"""Slot blocks start and end on this many bytes: the unit of direct reads."""

VIEW_ALIGN = 64
"""Views start on a cache line: matrix products on the CPU may round differently with alignment."""


def align_up(nbytes: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `nbytes`."""
    return -(-nbytes // alignment) * alignment


@dataclass(frozen=True, slots=True)
class TensorView:
    """A contiguous tensor inside a slot block; `offset` in bytes from the block's start."""

    dtype: "torch.dtype"
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes the view covers."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes of `file` from `offset`, that belong at `slot_offset` of the slot block."""

    file: Path
    offset: int
    length: int
    slot_offset: int


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """One expert: what to read, and what lies where once it is in a slot of `nbytes` bytes."""

    extents: tuple[Extent, ...]
    views: Mapping[str, TensorView]
    nbytes: int

    @property
    def bytes_read(self) -> int:
        """Bytes that one fetch takes from disk (padding between views may be left out)."""
        return sum(extent.length for extent in self.extents)

    def check(self) -> None:
        """Raise ValueError unless the extents fill every view, disjointly and inside the block."""
        filled: list[tuple[int, int]] = []
        for extent in sorted(self.extents, key=lambda extent: extent.slot_offset):
            start, end = extent.slot_offset, extent.slot_offset + extent.length
            if start < 0 or extent.offset < 0 or extent.length <= 0 or end > self.nbytes:
                raise ValueError(f"{extent} does not lie inside a block of {self.nbytes} bytes")
            if filled and start < filled[-1][1]:
                raise ValueError(f"{extent} overlaps the extent before it in the slot")
            if filled and start == filled[-1][1]:
                start = filled.pop()[0]
            filled.append((start, end))
        for name, view in self.views.items():
            start, end = view.offset, view.offset + view.nbytes
            if start % VIEW_ALIGN:
                raise ValueError(f"view {name} starts at {start}, not on {VIEW_ALIGN} bytes")
            if not any(low <= start and end <= high for low, high in filled):
                raise ValueError(f"view {name} (bytes {start} to {end}) is not filled by extents")


def block_views(
    parts: "Mapping[str, tuple[torch.dtype, tuple[int, ...]]]",
) -> tuple[dict[str, TensorView], int]:
    """Lay named tensors one after the other in a block; returns the views and the block's size.

    Order is kept, each view starts on VIEW_ALIGN bytes, the size is a multiple of BLOCK_ALIGN.
    """
    views: dict[str, TensorView] = {}
    end = 0
    for name, (dtype, shape) in parts.items():
        view = TensorView(dtype, tuple(shape), align_up(end, VIEW_ALIGN))
        views[name] = view
        end = view.offset + view.nbytes
    return views, align_up(end, BLOCK_ALIGN)


class ExpertSource(Protocol):
    """Says where experts lie on disk. Thread-safe and non-blocking once it is constructed."""

    shape: ModelShape
    format: str
    nbytes: int
    views: Mapping[str, TensorView]

    def layout(self, key: ExpertKey) -> ExpertLayout:
        """Extents and views of one expert; every expert has the source's `views` and `nbytes`.

        Raises KeyError for an expert that the model does not have.
        """
        ...

    def checksum(self, key: ExpertKey) -> int | None:
        """xxh3_64 over the extents' bytes in extent order; None where none is known yet."""
        ...

"""The arena: one allocation, cut into equal slots that hold one expert's block each.

Knows neither experts nor who uses a slot: ExpertCache decides, transfers write, kernels read.
"""

import logging
import math
import mmap
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import torch

from ..errors import InsufficientMemoryError
from . import pinning
from .layout import BLOCK_ALIGN, VIEW_ALIGN, TensorView
from .memory import map_memory

logger = logging.getLogger(__name__)


def _is_locked(block: torch.Tensor) -> bool:
    """Page-lock a block; False, and a warning, where that is refused."""
    try:
        pinning.lock(block)
    except RuntimeError as error:
        logger.warning(
            "%.2f GiB of host memory cannot be pinned (%s): copies to the device will be slower; "
            "raise the limit of locked memory (ulimit -l) or give a smaller --host-memory",
            block.nbytes / 2**30,
            str(error).splitlines()[0],
        )
        return False
    return True


class SlotArena:
    """`num_slots` blocks of `nbytes` bytes on `device`, each seen through the same `views`.

    On the CPU the blocks are anonymous memory, page-aligned, so that direct reads may land in them.
    `is_pinned` locks them in memory, which copies to a GPU want; where the system refuses, they are
    pageable and a warning says so. Raises ValueError for sizes or views off the alignment,
    InsufficientMemoryError if the allocation is refused.
    """

    def __init__(
        self,
        num_slots: int,
        views: Mapping[str, TensorView],
        nbytes: int,
        *,
        device: str | torch.device = "cpu",
        is_pinned: bool = False,
    ) -> None:
        if num_slots < 1 or nbytes < 1 or nbytes % BLOCK_ALIGN:
            raise ValueError(
                f"an arena of {num_slots} slots of {nbytes} bytes: at least one slot is needed, "
                f"and blocks are a multiple of {BLOCK_ALIGN} bytes"
            )
        for name, view in views.items():
            if view.offset % VIEW_ALIGN or view.offset + view.nbytes > nbytes:
                raise ValueError(f"{name}: {view} does not fit an aligned block of {nbytes} bytes")
        self.num_slots = num_slots
        self.nbytes = nbytes
        self.views = dict(views)
        self.device = torch.device(device)
        total = num_slots * nbytes
        self._memory: mmap.mmap | None = None
        try:
            if self.device.type == "cpu":
                self._memory = map_memory(total)
                arena = torch.frombuffer(self._memory, dtype=torch.uint8)
            else:
                arena = torch.empty(total, dtype=torch.uint8, device=self.device)
        except (OSError, OverflowError, MemoryError, torch.OutOfMemoryError) as error:
            raise InsufficientMemoryError(
                f"{num_slots} expert slots of {nbytes} bytes ({total / 2**30:.2f} GiB) could not "
                f"be allocated on {self.device}; give a smaller --expert-memory"
            ) from error
        self._locked = arena if is_pinned and _is_locked(arena) else None
        self._blocks = None if self._memory is None else memoryview(self._memory)
        self._bytes: torch.Tensor = arena.view(num_slots, nbytes)
        self._stacked = {name: self._strided(view) for name, view in views.items()}

    def _strided(self, view: TensorView) -> torch.Tensor:
        itemsize = view.dtype.itemsize
        inner = [math.prod(view.shape[axis + 1 :]) for axis in range(len(view.shape))]
        return (
            self._bytes.view(-1)
            .view(view.dtype)
            .as_strided(
                (self.num_slots, *view.shape),
                (self.nbytes // itemsize, *inner),
                view.offset // itemsize,
            )
        )

    def block(self, slot: int) -> memoryview:
        """Writable bytes of one slot on the CPU; valid until `close`. TypeError on a device."""
        if self._blocks is None:
            raise TypeError(f"slots on {self.device}, or of a closed arena, have no host memory")
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} of an arena of {self.num_slots}")
        return self._blocks[slot * self.nbytes : (slot + 1) * self.nbytes]

    def bytes_of(self, slot: int) -> torch.Tensor:
        """One slot's block as uint8 [nbytes], on the arena's device; shares memory."""
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} of an arena of {self.num_slots}")
        return self._bytes[slot]

    def view(self, slot: int, name: str) -> torch.Tensor:
        """One named tensor of one slot; shares memory, changes when the slot is overwritten."""
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} of an arena of {self.num_slots}")
        return self._stacked[name][slot]

    def stacked(self, name: str) -> torch.Tensor:
        """[S, ...] over all slots, strided by the block (dim 0 may pass 2^31 elements)."""
        return self._stacked[name]

    def poison(self, slot: int) -> None:
        """Fill a slot with 0xFF bytes, which every float format reads as NaN."""
        self._bytes[slot].fill_(0xFF)

    def close(self) -> None:
        """Give the memory back; idempotent. Tensors still held elsewhere keep it alive."""
        if self._locked is not None:
            pinning.unlock(self._locked)
            self._locked = None
        self._stacked = {}
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._blocks = None
        # The mapping goes with its last reader: closing it under a tensor would be a use after
        # free, so it is dropped here and unmapped by the reference count.
        self._memory = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

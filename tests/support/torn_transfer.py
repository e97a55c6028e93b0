"""A transfer engine whose copies are torn while they run, and end as fate has it."""

import random
from typing import Any

from outrider.collect.schema import ExpertKey
from outrider.runtime.errors import TransferError
from outrider.runtime.experts.cache import Kind
from outrider.runtime.experts.slots import SlotArena
from outrider.runtime.testing import ManualCopy, ManualTransfer, SyntheticExperts

TORN_BYTES = 100


class TornTransfer(ManualTransfer):
    """Poisons a slot when a copy is submitted, writes a little when the copy starts, and all of it
    at its end. Whoever waits lets fate act on copies in any order until the one waited for ends.

    `fails`, `refuses` and `interrupts` are chances: of a copy that ends, of one that is submitted,
    of a look while waiting.
    """

    def __init__(self, source: SyntheticExperts, arena: SlotArena, *, seed: int) -> None:
        super().__init__(source, arena)
        self.random = random.Random(seed)
        self.fails = self.refuses = self.interrupts = 0.0
        self.num_torn = 0
        self._torn_arena = arena
        self._experts = source

    def submit(self, key: ExpertKey, slot: int, kind: Kind) -> Any:
        if self.random.random() < self.refuses:
            raise TransferError(f"expert {key}: refused by fate")
        self._torn_arena.poison(slot)
        return super().submit(key, slot, kind)

    def start(self, transfer: Any) -> None:
        super().start(transfer)
        extent = self._experts.layout(transfer.key).extents[0]
        block = self._torn_arena.block(transfer.slot)
        with extent.file.open("rb") as file:
            file.seek(extent.offset)
            part = file.read(min(extent.length, TORN_BYTES))
        block[extent.slot_offset : extent.slot_offset + len(part)] = part
        self.num_torn += 1

    def act(self) -> None:
        """Start, complete or fail one of the pending copies, whatever its turn."""
        if not self.pending:
            return
        copy = self.random.choice(self.pending)
        action = self.random.random()
        if action < self.fails:
            self.fail(copy)
        elif action < 0.7:
            self.complete(copy)
        else:
            self.start(copy)

    def _serve(self) -> None:
        if self.random.random() < self.interrupts:
            raise KeyboardInterrupt
        self.act()


def torn_copies(engine: TornTransfer) -> list[ManualCopy]:
    """Copies under way, of which a part is written."""
    return [copy for copy in engine.pending if copy.is_started]

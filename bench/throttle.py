"""A slower disk than the machine's, for what is read through a transfer engine.

The kernel's own limit (`fence`) is an average over slices of 20 to 100 ms: after a pause reads run
at the disk's full speed until a slice's bytes are spent, which for single tokens is no slow disk.
"""

import threading
import time

from ..runtime.experts.pieces import Halt
from ..runtime.experts.reader import PieceReader, ReadPlan
from ..runtime.experts.thread_transfer import ThreadTransfer
from ..runtime.experts.tiered import TieredTransfer
from ..runtime.experts.transfer import TransferEngine


class ThrottledReader:
    """A reader of files behind a disk of a given speed: each piece takes its bytes' time at least.

    Pieces of all threads share the disk, one after the other. Takes the reader's place in a
    ThreadTransfer.
    """

    def __init__(self, reader: PieceReader, bytes_per_s: float) -> None:
        self._reader = reader
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def read_run(
        self, plan: ReadPlan, run: range, *, slot: memoryview, bounce: memoryview, halt: Halt
    ) -> int:
        """As FileReader's; each piece is there when a disk of that speed would have it."""
        for place, index in enumerate(run):
            if halt.value:
                return place
            with self._lock:
                now = time.perf_counter()
                length = plan.pieces[index].length
                self._free_at = max(self._free_at, now) + length / self._bytes_per_s
                ends = self._free_at
            one = range(index, index + 1)
            self._reader.read_run(plan, one, slot=slot, bounce=bounce, halt=Halt(0))
            while (left := ends - time.perf_counter()) > 0.0:
                time.sleep(left)
        return len(run)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


def throttle(transfers: TransferEngine, bytes_per_s: float) -> None:
    """Let reads of `transfers` come no faster from now on. Before its first copy."""
    disk = disk_of(transfers)
    disk.reader = ThrottledReader(disk.reader, bytes_per_s)


def disk_of(transfers: TransferEngine) -> ThreadTransfer:
    """What reads the disk for an engine, under a host tier or not."""
    if isinstance(transfers, TieredTransfer):
        transfers = transfers.disk
    assert isinstance(transfers, ThreadTransfer), "files are read by copy threads"
    return transfers

"""How fast memory and the model's files can be read at best, and how to empty the page cache.

Files are read in whole pieces with as many threads as the engine copies with, and nothing is done
with them: what a transfer engine could reach. Knows no expert.
"""

import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import InsufficientMemoryError
from ..runtime.experts.memory import map_memory

READ_BYTES = 256 << 20
READ_REPETITIONS = 3
DEVICE_READ_BYTES = 1 << 30
LINK_BYTES = 128 << 20
DEVICE_PIECE_BYTES = 4 << 20
PIECE_BYTES = 1 << 20
NUM_THREADS = 2
_BLOCK = 4096
_BUFFER_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Link:
    """Bytes a second from disk, and whether the reads went past the page cache (O_DIRECT)."""

    bytes_per_s: float
    is_direct: bool


def read_bandwidth() -> float:
    """Bytes a second of a plain read of 256 MiB in large pages, as slots are kept in. Blocks.

    The best of 3 by all of torch's threads and by one, which some machines need no more of; read by
    the native kernels' own threads where they were built, else summed by torch.
    """
    import torch

    from ..kernels import native

    memory = map_memory(READ_BYTES)
    block = torch.frombuffer(memory, dtype=torch.int64)
    block.fill_(1)
    times = []
    for num_threads in {1, torch.get_num_threads()}:
        for _ in range(READ_REPETITIONS):
            began = time.perf_counter()
            if native.is_available():
                native.read(block, num_threads=num_threads)
            else:
                block.sum()
            times.append(time.perf_counter() - began)
    return READ_BYTES / min(times)


def device_bandwidths(device: str) -> tuple[float, float]:
    """Bytes a second of a plain read of a CUDA device's memory, and of copies into it.

    Those come from pinned host memory, in pieces of 4 MiB. The best of 3 after one that does not
    count; blocks, and gives the 1.1 GiB back. Raises InsufficientMemoryError where they are not
    free. The read is a maximum over a GiB, by PyTorch.
    """
    import torch

    try:
        with torch.cuda.device(device):
            rates = _device_rates(device)
    except torch.OutOfMemoryError as error:
        raise InsufficientMemoryError(
            f"{device} has not the {(DEVICE_READ_BYTES + LINK_BYTES) >> 20} MiB free that its "
            "bandwidths are measured with; give arms a smaller --expert-memory"
        ) from error
    torch.cuda.empty_cache()
    return rates


def _device_rates(device: str) -> tuple[float, float]:
    import torch

    source = torch.ones(DEVICE_READ_BYTES // 8, dtype=torch.int64, device=device)
    block = torch.ones(LINK_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(block, device=device)

    def read() -> None:
        source.max()

    def copy() -> None:
        for begin in range(0, LINK_BYTES, DEVICE_PIECE_BYTES):
            piece = slice(begin, begin + DEVICE_PIECE_BYTES)
            target[piece].copy_(block[piece], non_blocking=True)

    times: dict[Callable[[], None], list[float]] = {read: [], copy: []}
    for _ in range(READ_REPETITIONS + 1):
        for work, taken in times.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
    return DEVICE_READ_BYTES / min(times[read][1:]), LINK_BYTES / min(times[copy][1:])


def link_bandwidth(files: Sequence[Path], *, seed: int = 0) -> Link:
    """Read 128 MiB of `files` in pieces of 1 MiB from random places, and time it. Blocks.

    Small files are read more than once. Where a file system has no direct reads, the pages are
    given back first and the reads are buffered. Raises OSError as the file system does, ValueError
    if no file holds a block.
    """
    largest = max(files, key=lambda file: file.stat().st_size)
    piece = min(PIECE_BYTES, largest.stat().st_size // _BLOCK * _BLOCK)
    if not piece:
        raise ValueError(f"{largest} is smaller than a block of {_BLOCK} bytes")
    descriptor, is_direct = _open(largest)
    try:
        places = (largest.stat().st_size - piece) // _BLOCK + 1
        chooser = random.Random(seed)
        offsets = [chooser.randrange(places) * _BLOCK for _ in range(max(1, LINK_BYTES // piece))]
        threads = [
            threading.Thread(
                target=_read, args=(descriptor, offsets[first::NUM_THREADS]), kwargs={"size": piece}
            )
            for first in range(NUM_THREADS)
        ]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
    finally:
        os.close(descriptor)
    return Link(len(offsets) * piece / seconds, is_direct)


def drop_page_cache(files: Sequence[Path]) -> float:
    """Ask the system to forget the pages of `files`; returns the share of probes still cached.

    A page that is mapped or not yet written back stays. Blocks while dirty pages are written.
    """
    num_probes = num_cached = 0
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(descriptor).st_size
            for offset in range(0, size, max(_BLOCK, size // 16)):
                num_probes += 1
                num_cached += _is_cached(descriptor, offset)
        finally:
            os.close(descriptor)
    return num_cached / num_probes if num_probes else 0.0


def _is_cached(descriptor: int, offset: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) > 0
    except OSError:
        # EAGAIN: it would have to wait for the disk. Where the flag is unknown, nothing is claimed.
        return False


def _open(file: Path) -> tuple[int, bool]:
    descriptor = open_direct(file)
    if descriptor is not None:
        return descriptor, True
    drop_page_cache([file])
    return os.open(file, os.O_RDONLY), False


def open_direct(file: Path) -> int | None:
    """A descriptor of `file` whose reads go past the page cache; None where there are none such."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    try:
        # Some file systems accept the flag and refuse the read.
        os.preadv(descriptor, [mmap.mmap(-1, _BLOCK)], 0)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _read(descriptor: int, offsets: Sequence[int], *, size: int) -> None:
    # Large pages, as the engine's own buffers: a direct read into small ones is cut up.
    with memoryview(map_memory(_BUFFER_BYTES)) as memory, memory[:size] as buffer:
        for offset in offsets:
            os.preadv(descriptor, [buffer], offset)

"""`outrider bench transfer`: what disk, memory and a GPU's link carry, by block size and depth.

Each combination is timed several times, all in turn, so that what else the machine does falls on
all alike.
"""

import mmap
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import OutriderError, UsageError
from ..runtime.experts.memory import map_memory
from ..runtime.sizes import format_bytes
from .bandwidth import drop_page_cache, open_direct
from .environment import environment
from .spread import spread

BLOCKS = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
DEPTHS = (1, 2, 4)
BYTES = 64 << 20
REPETITIONS = 5
MEDIA = ("disk", "memory", "link")
_ALIGN = 4096

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """What is timed: `file` is read (None: one is written into `folder` for the run)."""

    media: tuple[str, ...] = ("disk", "memory")
    blocks: tuple[int, ...] = BLOCKS
    depths: tuple[int, ...] = DEPTHS
    bytes_each: int = BYTES
    repetitions: int = REPETITIONS
    file: Path | None = None
    folder: Path | None = None
    seed: int = 0


def bench_transfer(options: TransferOptions, *, progress: Progress) -> dict[str, Any]:
    """The document of one run. Blocks for about a minute with the defaults.

    UsageError for options that cannot be, a link where there is no GPU among them; OutriderError
    where the test file cannot be written or read.
    """
    _check(options)
    around = environment()
    combinations = [
        (medium, block, depth)
        for medium in options.media
        for block in options.blocks
        for depth in options.depths
        if medium != "link" or depth == options.depths[0]
    ]
    seconds: dict[tuple[str, int, int], list[float]] = {one: [] for one in combinations}
    with _file(options) as path:
        is_direct = None
        movers: dict[str, Callable[[int, int, int], float]] = {}
        if "disk" in options.media:
            disk = _Disk(path, options.bytes_each)
            is_direct = disk.is_direct
            movers["disk"] = disk.read
        if "memory" in options.media:
            movers["memory"] = _Memory(options.bytes_each).copy
        if "link" in options.media:
            movers["link"] = _Link(options.bytes_each).copy
        total = options.repetitions * len(combinations)
        try:
            for repetition in range(options.repetitions):
                for index, one in enumerate(combinations):
                    progress("timing", repetition * len(combinations) + index, total)
                    medium, block, depth = one
                    seconds[one].append(movers[medium](block, depth, options.seed + repetition))
        except OSError as error:
            raise OutriderError(f"{path}: cannot be read: {error.strerror or error}") from error
        progress("timing", total, total)
    rows = [
        _row(one, values, options, is_direct if one[0] == "disk" else None, around.stamp())
        for one, values in seconds.items()
    ]
    return {
        "bench": "transfer",
        "environment": around.ended().as_dict(),
        "settings": {
            "bytes_each": options.bytes_each,
            "file": "written for this run" if options.file is None else options.file.name,
            "seed": options.seed,
        },
        "rows": rows,
    }


def _row(
    one: tuple[str, int, int],
    seconds: Sequence[float],
    options: TransferOptions,
    is_direct: bool | None,
    stamp: dict[str, object],
) -> dict[str, Any]:
    medium, block, depth = one
    count = max(1, options.bytes_each // block)
    rates = spread([count * block / value / 1e9 for value in seconds])
    return {
        "medium": medium,
        "block_bytes": block,
        "depth": depth,
        "gb_per_s": rates.median,
        "spread": {
            "low": rates.low,
            "high": rates.high,
            "confidence": rates.confidence,
            "count": rates.count,
        },
        "microseconds_per_block": 1e6 * spread(seconds).median / count,
        "is_direct": is_direct,
        "repetitions": len(seconds),
        "device": "cpu" if medium != "link" else "cuda",
        **stamp,
    }


class _Disk:
    """Random aligned reads of one file, past the page cache where the file system has that."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self._path = path
        self._nbytes = nbytes
        self._size = path.stat().st_size
        descriptor = open_direct(path)
        self.is_direct = descriptor is not None
        if descriptor is not None:
            os.close(descriptor)

    def read(self, block: int, depth: int, seed: int) -> float:
        """Seconds in which `depth` threads read all blocks, each one after the other."""
        if not self.is_direct:
            drop_page_cache([self._path])
        flags = os.O_RDONLY | (os.O_DIRECT if self.is_direct else 0)
        descriptor = os.open(self._path, flags)
        places = max(1, (self._size - block) // _ALIGN + 1)
        chooser = random.Random(seed)
        offsets = [chooser.randrange(places) * _ALIGN for _ in range(max(1, self._nbytes // block))]
        buffers = [map_memory(max(block, 2 << 20)) for _ in range(depth)]

        def work(first: int) -> None:
            with memoryview(buffers[first]) as memory, memory[:block] as buffer:
                for offset in offsets[first::depth]:
                    os.preadv(descriptor, [buffer], offset)

        try:
            return _together(work, depth)
        finally:
            os.close(descriptor)


class _Memory:
    """Copies from one part of memory into another, as an arena in RAM is filled from a cache."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._source, self._target = map_memory(nbytes), map_memory(nbytes)
        for memory in (self._source, self._target):
            for offset in range(0, nbytes, mmap.PAGESIZE):
                memory[offset] = 1

    def copy(self, block: int, depth: int, seed: int) -> float:
        """Seconds for all blocks by `depth` threads, in an order of chance."""
        count = max(1, self._nbytes // block)
        order = list(range(count))
        random.Random(seed).shuffle(order)
        import torch

        source = torch.frombuffer(self._source, dtype=torch.uint8)
        target = torch.frombuffer(self._target, dtype=torch.uint8)

        def work(first: int) -> None:
            for index in order[first::depth]:
                part = slice(index * block, (index + 1) * block)
                target[part].copy_(source[part])

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return _together(work, depth)
        finally:
            torch.set_num_threads(threads)


class _Link:
    """Copies from pinned memory to the GPU."""

    def __init__(self, nbytes: int) -> None:
        import torch

        self._nbytes = nbytes
        self._source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self._target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    def copy(self, block: int, depth: int, seed: int) -> float:
        """Seconds for all blocks on one stream."""
        import torch

        torch.cuda.synchronize()
        began = time.perf_counter()
        for index in range(max(1, self._nbytes // block)):
            part = slice(index * block, (index + 1) * block)
            self._target[part].copy_(self._source[part], non_blocking=True)
        torch.cuda.synchronize()
        return time.perf_counter() - began


def _together(work: Callable[[int], None], depth: int) -> float:
    failures: list[BaseException] = []

    def guarded(first: int) -> None:
        try:
            work(first)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(depth)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if failures:
        raise failures[0]
    return seconds


@contextmanager
def _file(options: TransferOptions) -> Iterator[Path]:
    if options.file is not None or "disk" not in options.media:
        yield options.file or Path()
        return
    size = max(4 * options.bytes_each, 2 * max(options.blocks))
    folder = options.folder or Path(tempfile.gettempdir())
    try:
        stat = os.statvfs(folder)
        free = stat.f_bavail * stat.f_frsize
        if free < 2 * size:
            raise OutriderError(
                f"{folder}: the test file takes {format_bytes(size)} and {format_bytes(free)} are "
                "free; give another --folder, or a --file to read"
            )
        with tempfile.NamedTemporaryFile(prefix="outrider-transfer-", dir=folder) as file:
            piece = os.urandom(1 << 20)
            for _ in range(size // len(piece)):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            yield Path(file.name)
    except OSError as error:
        raise OutriderError(
            f"{folder}: a test file of {format_bytes(size)} cannot be written: "
            f"{error.strerror or error}"
        ) from error


def _check(options: TransferOptions) -> None:
    unknown = [name for name in options.media if name not in MEDIA]
    if unknown or not options.media:
        raise UsageError(
            f"medium {(unknown or ['none'])[0]!r} is unknown; known ones: {', '.join(MEDIA)}"
        )
    if "link" in options.media:
        import torch

        if not torch.cuda.is_available():
            raise UsageError("medium link: no CUDA device is here; disk and memory can be measured")
    for block in options.blocks:
        if block < _ALIGN or block % _ALIGN or block > options.bytes_each:
            raise UsageError(
                f"block of {block} bytes: accepted are multiples of {_ALIGN} up to "
                f"{format_bytes(options.bytes_each)}"
            )
    if not options.blocks or not options.depths or min(options.depths) < 1:
        raise UsageError("at least one block size, and one depth of 1 or more, are needed")
    if options.file is not None:
        if not options.file.is_file():
            raise UsageError(f"file: {str(options.file)!r} is not there")
        if options.file.stat().st_size < max(options.blocks):
            raise UsageError(
                f"file: {str(options.file)!r} is smaller than a block of "
                f"{format_bytes(max(options.blocks))}"
            )

"""What this machine is and how fast its memory and disk read, measured now."""

import mmap
import os
import platform
import time
from pathlib import Path

_MEMORY_BYTES = 256 << 20
_DISK_BYTES = 256 << 20
_DISK_PIECE_BYTES = 4 << 20
_REPETITIONS = 3


def cpu_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def memory_read_bandwidth() -> float:
    """Bytes/s of a plain read by all of torch's threads; best of 3 over 256 MiB. Blocks."""
    # Naming the processor takes no torch, and the benchmark's own process has none.
    import torch

    block = torch.ones(_MEMORY_BYTES // 8, dtype=torch.int64)
    times = []
    for _ in range(_REPETITIONS):
        began = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - began)
    return _MEMORY_BYTES / min(times)


def disk_read_bandwidth(file: Path) -> tuple[float, bool] | None:
    """Bytes/s of cold sequential reads of `file` (its first 256 MiB), and whether they were direct.

    Without O_DIRECT the page cache is asked to let go of the file first. None for files below
    4 MiB. Blocks.
    """
    size = min(file.stat().st_size, _DISK_BYTES) // _DISK_PIECE_BYTES * _DISK_PIECE_BYTES
    if not size:
        return None
    buffer = mmap.mmap(-1, _DISK_PIECE_BYTES)
    descriptor, is_direct = _open_cold(file, buffer)
    try:
        began = time.perf_counter()
        for offset in range(0, size, _DISK_PIECE_BYTES):
            os.preadv(descriptor, [buffer], offset)
        return size / (time.perf_counter() - began), is_direct
    finally:
        os.close(descriptor)


def _open_cold(file: Path, buffer: mmap.mmap) -> tuple[int, bool]:
    if hasattr(os, "O_DIRECT"):
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
            os.preadv(descriptor, [buffer], 0)
            return descriptor, True
        except OSError:
            pass  # the file system has no direct reads: the other way follows
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return descriptor, False

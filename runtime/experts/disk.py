"""Writing into a folder that others may write too: its lock, its free space, its errors.

Knows no expert, shard or index.
"""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from ...collect.durable import fsync_directory
from ..errors import OutriderError

LOCK_NAME = "pack.lock"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}
_WRITABLE_ADVICE = "name a writable folder with --out (a pack) or OUTRIDER_CACHE (the cache)"


@contextmanager
def explained(path: Path, *, needed_bytes: int = 0) -> Iterator[None]:
    """Turn an OSError of writing `path` into an OutriderError that says what to do.

    `needed_bytes` is what remains to be written, if known, for the message of a full disk or quota.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            needed = f"{needed_bytes} more bytes are needed, " if needed_bytes else ""
            message = (
                f"{reason} while writing {path}: {needed}{free_bytes(path.parent)} bytes are free; "
                "what is finished is kept, so make room and run the command again"
            )
        elif error.errno in _UNWRITABLE:
            message = f"cannot write {path}: {reason}; {_WRITABLE_ADVICE}"
        else:
            message = f"writing {path} failed: {reason}"
        raise OutriderError(message) from error


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write below `folder`, which need not exist yet."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_free(folder: Path, needed_bytes: int) -> None:
    """Raise OutriderError unless `needed_bytes` more fit below `folder` (quotas are not seen)."""
    free = free_bytes(folder)
    if free < needed_bytes:
        raise OutriderError(
            f"not enough space for the expert store in {folder}: {needed_bytes} more bytes are "
            f"needed, {free} are free; make room, or {_WRITABLE_ADVICE}"
        )


@contextmanager
def folder_lock(folder: Path, *, on_wait: Callable[[Path], None] | None = None) -> Iterator[None]:
    """Hold `folder` for writing, making it if need be, against other processes and threads.

    Blocks while another holds it, after calling `on_wait(folder)` once. The system frees the lock
    of a process that dies. Raises OutriderError where the folder cannot be written.
    """
    path = folder / LOCK_NAME
    with explained(path):
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            fsync_directory(folder.parent)
        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if on_wait is not None:
                on_wait(folder)
            lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()

"""Files that are there whole or not at all: written beside their place, fsynced, renamed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def fsync_directory(directory: Path) -> None:
    """Make renames inside `directory` survive a crash. Blocks on the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def durable_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` only when the block ends without an error.

    A reader sees the old file or the new one, never a part. The temporary file stands in the same
    folder as `.{name}.*.tmp` and is removed on any exception; a crash can leave one behind, which
    `remove_leftovers` clears. Blocks on fsync. Raises OSError as the file system does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            try:
                yield file
            except BaseException:
                # The file is thrown away; flushing it to a full disk would hide the first error.
                file.raw.close()
                raise
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes 0600 files; shared caches need what the umask would have given.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
        fsync_directory(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_leftovers(directory: Path) -> list[Path]:
    """Remove temporary files that a killed writer left in `directory`; returns what was removed."""
    leftovers = sorted(directory.glob(".*.tmp"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return leftovers

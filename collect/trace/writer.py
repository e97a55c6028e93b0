"""Writes trace shards: one finished shard at a time, each whole or not at all, under the folder's
lock.

Owns the files of a trace folder while it is open. Knows nothing of models.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import filelock
import msgspec

from ..durable import durable_write, remove_leftovers
from ..errors import DirectoryInUseError, OutOfSpaceError, ResumeError, TraceError
from .encoding import HIDDEN, SHARDS, EncodedShard, ShardRows, encode_shard
from .manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    read_manifest,
    refuse_differences,
    write_manifest,
)

ROUTERS_NAME, TOKENIZER_NAME = "routers.safetensors", "tokenizer.json"
_LOCK_NAME = ".collect.lock"
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class TraceWriter:
    """Holds a trace folder open for writing, alone; a context manager.

    With `resume=False` the folder must hold no traces; with `resume=True` it goes on after the last
    finished shard, and `manifest` is then the folder's own one. Leftovers of a killed writer and
    shards the manifest does not list are removed. Blocks on the disk in every method. Raises
    DirectoryInUseError, ResumeError, TraceError, OutOfSpaceError.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, resume: bool = False) -> None:
        self.directory = directory
        self.manifest = manifest
        self._lock = lock_directory(directory)
        try:
            self.manifest = self._begin(manifest, resume=resume)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    def write_shard(self, rows: ShardRows) -> ShardEntry:
        """Encode one shard here and commit it; as `commit`."""
        return self.commit(encode_shard(rows, self.manifest))

    def commit(self, shard: EncodedShard) -> ShardEntry:
        """Write one shard: hidden states, then rows, then the manifest that makes it count.

        Shards may come in any order; the manifest lists them by sample. TraceError where one holds
        samples that are finished or not planned: nothing is written then. OutOfSpaceError leaves
        every finished shard as it was.
        """
        entry = shard.entry
        self._refuse_misplaced(entry)
        try:
            if entry.hidden is not None:
                with durable_write(self.directory / entry.hidden) as file:
                    file.write(shard.hidden)
            with durable_write(self.directory / entry.file) as file:
                file.write(shard.rows)
            shards = sorted((*self.manifest.shards, entry), key=lambda one: one.first_sample)
            self._replace(shards=tuple(shards))
        except OSError as error:
            raise self._explained(error, entry) from error
        return entry

    def write_routers(self, serialized: bytes) -> None:
        """Write `routers.safetensors`, once a collection; an existing one stays as it is."""
        if (self.directory / ROUTERS_NAME).exists():
            return
        with _explaining(self.directory), durable_write(self.directory / ROUTERS_NAME) as file:
            file.write(serialized)

    def write_tokenizer(self, serialized: str) -> None:
        """Keep the tokenizer (its own JSON), so that analysis can show text without the model."""
        with _explaining(self.directory), durable_write(self.directory / TOKENIZER_NAME) as file:
            file.write(serialized.encode())

    def finish(self) -> None:
        """Mark the collection as complete."""
        with _explaining(self.directory):
            self._replace(complete=True)

    def _begin(self, manifest: Manifest, *, resume: bool) -> Manifest:
        exists = (self.directory / MANIFEST_NAME).exists()
        if exists and not resume:
            raise ResumeError(
                f"{str(self.directory)!r} already holds traces; "
                "go on with --resume, or choose a new folder"
            )
        if not exists:
            with _explaining(self.directory):
                (self.directory / SHARDS).mkdir(exist_ok=True)
                write_manifest(self.directory, manifest)
        else:
            begun = read_manifest(self.directory)
            refuse_differences(begun, manifest, self.directory)
            manifest = begun
        self._sweep(manifest)
        return manifest

    def _sweep(self, manifest: Manifest) -> None:
        listed = {shard.file for shard in manifest.shards} | {
            shard.hidden for shard in manifest.shards
        }
        remove_leftovers(self.directory)
        for folder in (self.directory / SHARDS, self.directory / HIDDEN):
            if folder.is_dir():
                remove_leftovers(folder)
                for path in folder.iterdir():
                    if path.relative_to(self.directory).as_posix() not in listed:
                        path.unlink()

    def _refuse_misplaced(self, entry: ShardEntry) -> None:
        first, end = entry.first_sample, entry.first_sample + entry.num_samples
        if not any(
            entry.dataset == planned.name
            and planned.first_sample <= first < end <= planned.first_sample + planned.num_samples
            for planned in self.manifest.datasets
        ):
            raise TraceError(f"samples {first} to {end - 1} of {entry.dataset} are not planned")
        for other in self.manifest.shards:
            if first < other.first_sample + other.num_samples and other.first_sample < end:
                raise TraceError(
                    f"samples {first} to {end - 1} are finished already, in {other.file}"
                )

    def _replace(self, **changes: object) -> None:
        manifest = msgspec.structs.replace(self.manifest, **changes)
        write_manifest(self.directory, manifest)
        self.manifest = manifest

    def _explained(self, error: OSError, entry: ShardEntry) -> OutOfSpaceError:
        done = self.manifest.num_finished
        measured = self.manifest.shards or (entry,)
        used = sum(shard.nbytes + shard.hidden_nbytes for shard in measured)
        samples = sum(shard.num_samples for shard in measured)
        needed = used * (self.manifest.num_samples - done) // samples
        return explain_write_error(
            error,
            self.directory,
            then=f"{done} finished samples are kept and about {needed:,} bytes are still needed; "
            "make room and go on with --resume",
        )


def lock_directory(directory: Path) -> filelock.FileLock:
    """Take the folder (made if need be) for one collector; the caller releases. Does not wait.

    The system drops the lock when its process dies. DirectoryInUseError where another one holds it,
    OutOfSpaceError where the folder cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(directory / _LOCK_NAME, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise DirectoryInUseError(
            f"another collector is writing to {str(directory)!r}; "
            "wait for it, or choose another folder"
        ) from None
    except OSError as error:
        raise explain_write_error(
            error, directory, then="choose a folder that can be written"
        ) from error
    return lock


def explain_write_error(error: OSError, directory: Path, *, then: str) -> OutOfSpaceError:
    """The error a person is shown for a failed write, with what to do next."""
    reason = (
        "the disk is full"
        if error.errno in _FULL_DISK
        else f"writing failed ({error.strerror or error})"
    )
    return OutOfSpaceError(f"{reason} at {str(directory)!r}; {then}")


@contextmanager
def _explaining(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explain_write_error(
            error, directory, then="make room or choose another folder"
        ) from error

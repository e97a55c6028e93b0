"""Writes trace shards: one finished shard at a time, each whole or not at all, under the folder's
lock.

Owns the files of a trace folder while it is open. Knows nothing of models; takes arrays.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import filelock
import msgspec
import numpy as np
import pyarrow.parquet as pq
import xxhash

from ..durable import durable_write, remove_leftovers
from ..errors import DirectoryInUseError, OutOfSpaceError, ResumeError, TraceError
from .columns import encodings, shard_schema, to_table
from .manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    read_manifest,
    refuse_differences,
    write_manifest,
)

if TYPE_CHECKING:
    import torch

SHARDS, HIDDEN, ROUTERS_NAME, TOKENIZER_NAME = (
    "shards",
    "hidden",
    "routers.safetensors",
    "tokenizer.json",
)
_LOCK_NAME = ".collect.lock"
_ROW_GROUP_TOKENS = 8192
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class ShardRows:
    """The rows of one shard, in sample order.

    `columns` has an array for every column of the schema, [rows] or [rows, width]; `hidden` maps a
    Mixture-of-Experts layer to its router inputs [rows, H] on the CPU.
    """

    dataset: str
    first_sample: int
    num_samples: int
    batch_size: int
    columns: Mapping[str, np.ndarray]
    hidden: Mapping[int, torch.Tensor]


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
        """Commit one shard: hidden states, then rows, then the manifest that makes it count.

        Shards come in sample order, without gap or overlap (TraceError). OutOfSpaceError leaves
        every finished shard as it was.
        """
        expected = self.manifest.num_finished
        if rows.first_sample != expected:
            raise TraceError(
                f"shard begins at sample {rows.first_sample}, the next one is {expected}"
            )
        stem = f"{len(self.manifest.shards):05d}-{_safe(rows.dataset)}"
        try:
            entry = self._write(rows, stem)
            self._replace(shards=(*self.manifest.shards, entry))
        except OSError as error:
            raise self._explained(error, rows) from error
        return entry

    def write_routers(
        self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
    ) -> None:
        """Write `routers.safetensors`, once a collection; an existing one stays as it is."""
        if (self.directory / ROUTERS_NAME).exists():
            return
        with _explaining(self.directory), durable_write(self.directory / ROUTERS_NAME) as file:
            file.write(_safetensors(tensors, metadata))

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

    def _write(self, rows: ShardRows, stem: str) -> ShardEntry:
        hidden, hidden_nbytes, hidden_checksum = None, 0, ""
        if rows.hidden:
            hidden = f"{HIDDEN}/{stem}.safetensors"
            named = {f"layer_{layer_idx}": states for layer_idx, states in rows.hidden.items()}
            data = _safetensors(named, {"first_sample": str(rows.first_sample)})
            with durable_write(self.directory / hidden) as file:
                file.write(data)
            hidden_nbytes, hidden_checksum = len(data), xxhash.xxh3_64_hexdigest(data)
        path = self.directory / SHARDS / f"{stem}.parquet"
        schema = shard_schema(self.manifest.shape, self.manifest.probabilities)
        table = to_table(rows.columns, schema)
        with (
            durable_write(path) as file,
            pq.ParquetWriter(
                file,
                schema,
                compression="zstd",
                compression_level=1,
                write_page_checksum=True,
                **encodings(schema),
            ) as parquet,
        ):
            for start, end in _row_groups(rows.columns["sample_id"]):
                parquet.write_table(table.slice(start, end - start), row_group_size=end - start)
        written = path.read_bytes()
        return ShardEntry(
            file=f"{SHARDS}/{path.name}",
            dataset=rows.dataset,
            first_sample=rows.first_sample,
            num_samples=rows.num_samples,
            num_tokens=table.num_rows,
            batch_size=rows.batch_size,
            nbytes=len(written),
            checksum=xxhash.xxh3_64_hexdigest(written),
            hidden=hidden,
            hidden_nbytes=hidden_nbytes,
            hidden_checksum=hidden_checksum,
        )

    def _replace(self, **changes: object) -> None:
        manifest = msgspec.structs.replace(self.manifest, **changes)
        write_manifest(self.directory, manifest)
        self.manifest = manifest

    def _explained(self, error: OSError, rows: ShardRows) -> OutOfSpaceError:
        done = self.manifest.num_finished
        used = sum(shard.nbytes + shard.hidden_nbytes for shard in self.manifest.shards)
        if done:
            needed = used * (self.manifest.num_samples - done) // done
        else:
            raw = sum(column.nbytes for column in rows.columns.values())
            raw += sum(states.nbytes for states in rows.hidden.values())
            needed = raw * self.manifest.num_samples // rows.num_samples
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


def _row_groups(sample_ids: np.ndarray) -> Sequence[tuple[int, int]]:
    """Row ranges of at most about `_ROW_GROUP_TOKENS`, cut only between samples."""
    starts = np.flatnonzero(np.diff(sample_ids.astype(np.int64), prepend=-1))
    cuts, begin = [], 0
    for start, end in zip(starts, [*starts[1:], len(sample_ids)], strict=True):
        if end - begin > _ROW_GROUP_TOKENS and start > begin:
            cuts.append((begin, int(start)))
            begin = int(start)
    return [*cuts, (begin, len(sample_ids))]


def _safetensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    # Imported here: it pulls in torch, which a reader of rows alone does not need.
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata))


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)[:40]

"""Which checkpoint a store was made from: by content (fingerprint) and by sign (size and mtime)."""

from collections.abc import Sequence
from pathlib import Path

import msgspec


class SourceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the checkpoint as it stood when packed; `name` is relative to its folder."""

    name: str
    nbytes: int
    mtime_ns: int


class SourceIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which checkpoint a store was made from.

    `fingerprint` (`models.checkpoint.fingerprint`) names the contents and costs a read of the whole
    checkpoint; `folder` and `files` are the cheap sign, at start-up, that they are still the same.
    """

    fingerprint: str
    folder: str
    files: tuple[SourceFile, ...]

    @classmethod
    def of(cls, folder: Path, files: Sequence[Path], *, fingerprint: str = "") -> "SourceIdentity":
        """Record size and mtime of `files` (inside `folder`); OSError where one is missing."""
        folder = folder.absolute()
        recorded = []
        for file in sorted(file.absolute() for file in files):
            status = file.stat()
            recorded.append(
                SourceFile(
                    name=file.relative_to(folder).as_posix(),
                    nbytes=status.st_size,
                    mtime_ns=status.st_mtime_ns,
                )
            )
        return cls(fingerprint=fingerprint, folder=str(folder.resolve()), files=tuple(recorded))

    def changed_files(self) -> list[str]:
        """Names of recorded files that are gone, or of another size or mtime by now."""
        changed = []
        for file in self.files:
            try:
                status = (Path(self.folder) / file.name).stat()
            except OSError:
                changed.append(file.name)
                continue
            if (status.st_size, status.st_mtime_ns) != (file.nbytes, file.mtime_ns):
                changed.append(file.name)
        return changed

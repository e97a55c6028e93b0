"""What a measurement was taken with, so that it can be doubted: code, versions, machine, load."""

import os
import platform
import subprocess
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..runtime import memory
from ..runtime.machine import cpu_name

_PACKAGES = ("outrider", "torch", "transformers", "numpy")
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Environment:
    """One run's surroundings. `load_average`: runnable processes over the last minute, at the start
    and at the end: above the number of processors, the figures are a busy machine's.
    """

    commit: str | None
    has_uncommitted_changes: bool | None
    date: str
    versions: dict[str, str]
    platform: str
    cpu: str
    num_cpus: int
    memory_bytes: int
    load_average: tuple[float, ...]

    def ended(self) -> "Environment":
        """The same with the load at the end beside that at the start."""
        return replace(self, load_average=(*self.load_average, os.getloadavg()[0]))

    def as_dict(self) -> dict[str, object]:
        """The "environment" object of every bench."""
        return asdict(self)

    def stamp(self) -> dict[str, object]:
        """The fields that each row carries by itself."""
        fields = ("commit", "has_uncommitted_changes", "date", "versions", "cpu", "num_cpus")
        return {name: getattr(self, name) for name in fields}


def environment() -> Environment:
    """Look around, now. `commit` is None where outrider is installed and not a checkout."""
    commit = _git("rev-parse", "HEAD")
    changes = None if commit is None else _git("status", "--porcelain", "--untracked-files=no")
    return Environment(
        commit=commit,
        has_uncommitted_changes=None if changes is None else bool(changes),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"python": platform.python_version()}
        | {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        platform=platform.platform(),
        cpu=cpu_name(),
        num_cpus=len(os.sched_getaffinity(0)),
        memory_bytes=memory.total_bytes(),
        load_average=(os.getloadavg()[0],),
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    if not (_ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

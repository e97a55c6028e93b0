"""A fence around a process: how much memory it may take, page cache included, and how fast it may
read from disk.

Made of Linux control groups, version 1 or 2, as children of the group that the benchmark runs in.
Knows no arm.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtime.errors import UsageError

_MOUNTS = Path("/proc/self/mounts")
_OWN_GROUPS = Path("/proc/self/cgroup")
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")
_UNLIMITED_V1 = "-1"
_REMOVAL_TRIES = 50
_REMOVAL_PAUSE_S = 0.02


class Fence:
    """One group of processes with a limit each of memory and disk reads. A context manager.

    Of `name`, which may hold a path, what no folder's name can hold is replaced by dashes.
    Raises UsageError where this user may not make control groups.
    """

    def __init__(self, name: str) -> None:
        self._memory, self._is_v2 = _own_group("memory")
        self._io = _own_group("io" if self._is_v2 else "blkio")[0]
        folder = _NOT_IN_NAMES.sub("-", name)
        self._groups = [group / folder for group in dict.fromkeys((self._memory, self._io))]
        self.kind = f"control group v{2 if self._is_v2 else 1}"
        with _explained("make a control group"):
            if self._is_v2:
                control = self._memory / "cgroup.subtree_control"
                if not {"memory", "io"} <= set(control.read_text().split()):
                    control.write_text("+memory +io")
            for group in self._groups:
                group.mkdir()

    def limit_memory(self, nbytes: int | None) -> None:
        """From now on the group holds at most `nbytes`; pages above it are given back first.

        None takes the limit away. Raises UsageError where what is held cannot be made to fit.
        """
        unlimited = "max" if self._is_v2 else _UNLIMITED_V1
        name = "memory.max" if self._is_v2 else "memory.limit_in_bytes"
        value = unlimited if nbytes is None else str(nbytes)
        with _explained(f"limit memory to {value} bytes"):
            (self._groups[0] / name).write_text(value)

    def limit_reads(self, bytes_per_s: int, *, folder: Path) -> None:
        """From now on the disk that `folder` lies on is read at most this fast."""
        device = folder.stat().st_dev
        disk = f"{os.major(device)}:{os.minor(device)}"
        group = self._groups[-1]
        with _explained(f"limit reads to {bytes_per_s} bytes/s on device {disk}"):
            if self._is_v2:
                (group / "io.max").write_text(f"{disk} rbps={bytes_per_s}")
            else:
                path = group / "blkio.throttle.read_bps_device"
                path.write_text(f"{disk} {bytes_per_s}")

    def admit(self, pid: int) -> None:
        """Put a process inside; what it starts from now on is inside too."""
        with _explained(f"move process {pid}"):
            for group in self._groups:
                (group / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        """Remove the group, whose processes must have ended. Blocks for up to a second."""
        for group in self._groups:
            for _ in range(_REMOVAL_TRIES):
                try:
                    group.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(_REMOVAL_PAUSE_S)  # the kernel lets go of ended processes later

    def __enter__(self) -> "Fence":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _own_group(controller: str) -> tuple[Path, bool]:
    """The folder of the group that this process is in for `controller`, and whether it is v2's."""
    groups = {}
    for line in _OWN_GROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for one in controllers.split(","):
            groups[one] = path
    for line in _MOUNTS.read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup" and controller in options.split(",") and controller in groups:
            return _existing(Path(mount), groups[controller]), False
    for line in _MOUNTS.read_text().splitlines():
        _, mount, kind, *_ = line.split()
        root = Path(mount)
        if kind == "cgroup2" and controller in (root / "cgroup.controllers").read_text().split():
            return _existing(root, groups.get("", "/")), True
    raise UsageError(f"no control group for {controller!r} on this machine; run without limits")


def _existing(mount: Path, path: str) -> Path:
    inside = mount / path.lstrip("/")
    return inside if inside.is_dir() else mount  # a container may see its own group as the root


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot {what}: {error}; limits need the right to make control groups (root, or a "
            "delegated group as systemd-run --user --scope gives); run without limits otherwise"
        ) from error

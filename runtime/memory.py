"""How much memory there is and how much of it may be used, seen from inside a container too."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


class _Names(NamedTuple):
    limit: str
    used: str
    reclaimable: str


# https://docs.kernel.org/admin-guide/cgroup-v2.html, and .../cgroup-v1/memory.html.
_SECOND = _Names("memory.max", "memory.current", "inactive_file")
_FIRST = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def total_bytes() -> int:
    """Memory of this machine or, if smaller, of a control group that the process runs in."""
    limits = [_number(folder / names.limit) for folder, names in _groups()]
    return min([psutil.virtual_memory().total, *(limit for limit in limits if limit is not None)])


def available_bytes() -> int:
    """Memory that can be taken without swapping, within the limits of all control groups."""
    left = psutil.virtual_memory().available
    for folder, names in _groups():
        limit, used = _number(folder / names.limit), _number(folder / names.used)
        if limit is not None and used is not None:
            reclaimable = _statistic(folder, names.reclaimable)
            left = min(left, max(0, limit - used + reclaimable))
    return left


def device_bytes(device_type: str, index: int | None) -> tuple[int, int]:
    """Free and total bytes of a device; of the host for "cpu"."""
    if device_type == "cpu":
        return available_bytes(), total_bytes()
    import torch

    return torch.cuda.mem_get_info(index)


def _groups() -> Iterator[tuple[Path, _Names]]:
    """Folders of the groups we belong to, and of all above them."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = _CGROUP, _SECOND
        elif "memory" in controllers.split(","):
            root, names = _CGROUP / "memory", _FIRST
        else:
            continue
        folder = root / path.strip("/")
        yield from ((one, names) for one in (folder, *folder.parents) if one.is_relative_to(root))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _statistic(folder: Path, name: str) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)

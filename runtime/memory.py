"""How much memory there is and how much of it may be used, seen from inside a container too."""

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def total_bytes() -> int:
    """Memory of this machine or, if smaller, of the control group the process runs in."""
    limit = _cgroup_value("memory.max")
    total = psutil.virtual_memory().total
    return total if limit is None else min(total, limit)


def available_bytes() -> int:
    """Memory that can be taken without swapping, within the control group's limit."""
    available = psutil.virtual_memory().available
    limit, used = _cgroup_value("memory.max"), _cgroup_value("memory.current")
    if limit is None or used is None:
        return available
    reclaimable = _cgroup_stat("inactive_file")
    return min(available, max(0, limit - used + reclaimable))


def device_bytes(device_type: str, index: int | None) -> tuple[int, int]:
    """Free and total bytes of a device; of the host for "cpu"."""
    if device_type == "cpu":
        return available_bytes(), total_bytes()
    import torch

    return torch.cuda.mem_get_info(index)


def _cgroup_value(name: str) -> int | None:
    try:
        text = (_CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_stat(name: str) -> int:
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)

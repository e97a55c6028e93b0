"""What a device's memory allows: the batch size to begin with, and what memory is in use.

Owns the table of the first write-up. Uses nvidia-ml-py where there is an NVIDIA card, else psutil.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil

GIB = 1 << 30
# (device memory at least, samples a batch): A100 80 GB, A6000 48 GB, A100 40 GB, RTX 3090 24 GB.
# The A6000 has more memory than the A100 of 40 GB and takes fewer: that is how it was first
# measured.
_BATCH_SIZES = ((72 * GIB, 20), (44 * GIB, 12), (36 * GIB, 16), (20 * GIB, 8), (14 * GIB, 4))
_SMALLEST_GPU_BATCH = 2
CPU_BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Name, bytes in all and bytes in use of the device a model runs on."""

    name: str
    total_bytes: int
    used_bytes: int


def batch_size_for(device_type: str, total_bytes: int) -> int:
    """Samples of 64 tokens a batch to begin with; a constant on the CPU, by memory elsewhere."""
    if device_type == "cpu":
        return CPU_BATCH_SIZE
    for at_least, batch_size in _BATCH_SIZES:
        if total_bytes >= at_least:
            return batch_size
    return _SMALLEST_GPU_BATCH


def device_memory(device: Any) -> DeviceMemory:
    """The memory of a torch device as its driver reports it, other processes included."""
    if device.type == "cuda":
        return _cuda_memory(device)
    memory = psutil.virtual_memory()
    return DeviceMemory("CPU", memory.total, memory.total - memory.available)


def _cuda_memory(device: Any) -> DeviceMemory:
    import torch

    index = device.index if device.index is not None else torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    found = _driver_memory(f"GPU-{properties.uuid}")
    if found is None:
        # No driver library: the CUDA runtime knows the same two figures.
        free, total = torch.cuda.mem_get_info(index)
        found = (total, total - free)
    return DeviceMemory(properties.name, *found)


def _driver_memory(uuid: str) -> tuple[int, int] | None:
    """Total and used bytes of the card, by identity: torch may number the cards otherwise."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid))
            return int(memory.total), int(memory.used)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None

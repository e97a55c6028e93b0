"""Where a model runs."""

from importlib.util import find_spec

import torch


def device_of(wanted: str) -> torch.device:
    """The device that `EngineConfig.device` names, made the current one if it is a GPU.

    "auto" is the first GPU that torch and Triton can use, else the CPU.
    """
    if wanted == "auto":
        has_gpu = torch.cuda.is_available() and find_spec("triton") is not None
        wanted = "cuda" if has_gpu else "cpu"
    device = torch.device(wanted)
    if device.type != "cuda":
        return device
    # Kernels are launched on the current device, whatever their tensors' is.
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_device(index)
    return torch.device("cuda", index)

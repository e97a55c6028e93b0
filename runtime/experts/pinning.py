"""Page-locks host memory that copies to a CUDA device come from.

torch's own pinned tensors are rounded up to a power of two, so that 40 GiB asked for are 64 taken,
and are kept when they are no longer used. Memory that is there already is registered instead.
"""

import torch
from torch import Tensor


def lock(block: Tensor) -> None:
    """Page-lock a CPU tensor's memory, until `unlock`. Blocks while pages are made.

    Raises RuntimeError where the system or the driver refuses, or where there is no CUDA.
    """
    try:
        # 0: no flags; the memory is for the current device.
        torch.cuda.check_error(
            torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0)  # type: ignore[union-attr]
        )
    except AssertionError as error:  # torch was built without CUDA
        raise RuntimeError(str(error)) from error
    if not block.is_pinned():
        unlock(block)
        raise RuntimeError("registered memory does not count as pinned")


def unlock(block: Tensor) -> None:
    """Give back what `lock` took; before the memory goes."""
    torch.cuda.check_error(
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())  # type: ignore[union-attr]
    )

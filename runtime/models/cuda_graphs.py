"""CUDA graphs for work that is queued again and again: the one file of compute that has CUDA in it.

Whoever queues knows nothing of graphs: it hands over work once, and gets what to call instead.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Work = Callable[[], None]


class WorkQueue(Protocol):
    """Where a decoder's work is queued, in order."""

    def recorded(self, work: Work) -> Work:
        """What queues the same work on the same tensors again. `work` must have run before."""
        ...

    def host_like(self, tensor: Tensor) -> Tensor:
        """Host memory of that shape and dtype from and to which copies do not block."""
        ...

    def mark(self) -> None:
        """Remember how much is queued by now."""
        ...

    def wait(self) -> None:
        """Block until all that was queued at the last `mark` is done."""
        ...


class CudaGraphs:
    """Recorded work is a graph that the current stream replays. `cuda` is torch.cuda.

    All graphs share one memory pool, which is sound since they run one after the other: a tensor
    that outlives its graph's turn is to be made outside of the work. Kernels must have been
    compiled and loaded before, which is why work runs once by itself.
    """

    def __init__(self, device: torch.device, *, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        # torch looks a device's number up anew at every call that is not given the number.
        self._index = cuda.current_device() if device.index is None else device.index
        self._pool = cuda.graph_pool_handle()
        self._event = cuda.Event()
        # torch's own is one a process, of whichever device came first.
        self._stream = cuda.Stream(self._index)

    def recorded(self, work: Work) -> Work:
        """As `WorkQueue.recorded`; waits for the device."""
        self._cuda.synchronize(self._index)
        graph = self._cuda.CUDAGraph()
        # Other threads read files meanwhile; only what this one does is recorded.
        with self._cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            work()
        return graph.replay

    def host_like(self, tensor: Tensor) -> Tensor:
        """As `WorkQueue.host_like`: pinned."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def mark(self) -> None:
        """As `WorkQueue.mark`."""
        self._event.record(self._cuda.current_stream(self._index))

    def wait(self) -> None:
        """As `WorkQueue.wait`."""
        self._event.synchronize()

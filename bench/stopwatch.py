"""Times calls against yardsticks taken in turn with them: plain reads and dense products.

A stint is as many calls as read some hundred megabytes, so that one call's clock error and the
queue of a GPU do not matter. Knows no op.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import native

STINT_BYTES = 192 << 20
MIN_STINT_S = 2e-3


class Clock:
    """Seconds that work took on one device. Blocks until it is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call of `work`, on the device's own clock where it is a GPU."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


@dataclass(slots=True)
class PlainRead:
    """A read of the arena with nothing done to it: the most that any kernel can stream.

    Reads `STINT_BYTES` a time, from another place each, so that no cache holds them.
    """

    arena: Tensor
    clock: Clock
    _at: int = 0

    def rate(self) -> float:
        """Bytes a second, now."""
        flat = self.arena.view(-1)
        count = min(STINT_BYTES, flat.numel()) // 8 * 8
        if self._at + count > flat.numel():
            self._at = 0
        piece = flat[self._at : self._at + count].view(torch.int64)
        self._at += count
        return count / self.clock.seconds(lambda: _read(piece))


def _read(piece: Tensor) -> None:
    if piece.is_cpu and native.is_available():
        native.read(piece, num_threads=torch.get_num_threads())
    else:
        piece.sum()


class DenseProduct:
    """torch's dense product of a size, in one dtype: what prefill is compared with."""

    def __init__(self, size: tuple[int, int, int], dtype: torch.dtype, clock: Clock) -> None:
        rows, inputs, outputs = size
        generator = torch.Generator().manual_seed(0)
        self._rows = torch.randn(rows, inputs, generator=generator).to(dtype).to(clock.device)
        weight = torch.randn(outputs, inputs, generator=generator)
        self._weight = weight.to(dtype).to(clock.device)
        self._flops = 2 * rows * inputs * outputs
        self._clock = clock

    def rate(self) -> float:
        """Floating-point operations a second, now; the better of two."""

        def multiply() -> None:
            torch.nn.functional.linear(self._rows, self._weight)

        return self._flops / min(self._clock.seconds(multiply) for _ in range(2))


class Stint:
    """A run of calls in turn over the arena, timed together; goes on where it stopped."""

    def __init__(self, call: Callable[[int], object], num_bytes: int, clock: Clock) -> None:
        self._call, self._clock, self._turn = call, clock, 0
        took = clock.seconds(lambda: self._run(1))
        wanted = max(STINT_BYTES / num_bytes, MIN_STINT_S / max(took, 1e-9))
        # Work that computes for long is not made longer for its few bytes.
        self.num_calls = max(1, round(min(wanted, 0.1 / max(took, 1e-9))))

    def seconds(self) -> float:
        """Of one call, on average over the stint."""
        return self._clock.seconds(lambda: self._run(self.num_calls)) / self.num_calls

    def _run(self, count: int) -> None:
        for turn in range(self._turn, self._turn + count):
            self._call(turn)
        self._turn += count


def interleave(measures: Sequence[Callable[[], float]], repetitions: int) -> list[list[float]]:
    """Values of each measure, taken in turn (A B C A B C), after one round that is thrown away."""
    values: list[list[float]] = [[] for _ in measures]
    for repetition in range(repetitions + 1):
        for place, measure in enumerate(measures):
            value = measure()
            if repetition:
                values[place].append(value)
    return values

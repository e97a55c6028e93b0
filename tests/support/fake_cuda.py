"""torch.cuda without a device: streams and events that run nothing until told, and notice races.

Copies queued under `stream` are held as work; `run` carries work out in any order that streams and
events allow, so that what is not ordered by them is sooner or later seen out of order.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class FakeEvent:
    """Done once the work recorded before it is; one never recorded is done."""

    cuda: "FakeCuda"
    is_pending: bool = False
    recorded_at: int = 0

    def record(self, stream: "FakeStream") -> None:
        self.is_pending = True
        stream.work.append(("record", self))

    def query(self) -> bool:
        self.cuda.check()
        return not self.is_pending

    def synchronize(self) -> None:
        while self.is_pending:
            self.cuda.run_one()

    def elapsed_time(self, end: "FakeEvent") -> float:
        """Milliseconds, one for each piece of work carried out in between."""
        return float(end.recorded_at - self.recorded_at)


@dataclass
class FakeStream:
    cuda: "FakeCuda"
    priority: int
    work: deque[tuple[str, Any]] = field(default_factory=deque)

    def wait_event(self, event: FakeEvent) -> None:
        self.work.append(("wait", event))

    def synchronize(self) -> None:
        while self.work:
            self.cuda.run_one()

    @property
    def is_blocked(self) -> bool:
        return not self.work or (self.work[0][0] == "wait" and self.work[0][1].is_pending)


class FakeCuda:
    """Stands for torch.cuda. `error` is raised by the next query, as a sticky error would be."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams: list[FakeStream] = []
        self.computing = self.Stream(None, priority=0)
        self.current = self.computing
        self.error: Exception | None = None
        self.log: list[tuple[int, str]] = []

    def Stream(self, device: Any, *, priority: int) -> FakeStream:
        stream = FakeStream(self, priority)
        self.streams.append(stream)
        return stream

    def Event(self, *, enable_timing: bool = False) -> FakeEvent:
        return FakeEvent(self)

    def current_device(self) -> int:
        return 0

    def current_stream(self, device: int) -> FakeStream:
        return self.current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def launch(self, call: Callable[[], None]) -> None:
        """Queue work on the current stream."""
        self.current.work.append(("call", call))

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def run_one(self) -> None:
        """Carry out the next piece of work of a stream that is not waiting, whichever."""
        ready = [stream for stream in self.streams if not stream.is_blocked]
        assert ready, "streams wait for each other for ever"
        stream = self.random.choice(ready)
        kind, what = stream.work.popleft()
        if kind == "record":
            what.is_pending, what.recorded_at = False, len(self.log)
        elif kind == "call":
            what()
        self.log.append((self.streams.index(stream), kind))

    def run_some(self, count: int) -> None:
        for _ in range(count):
            if any(not stream.is_blocked for stream in self.streams):
                self.run_one()

    @property
    def is_idle(self) -> bool:
        return not any(stream.work for stream in self.streams)


class LaunchedBytes:
    """A block whose `copy_` is queued as work of the current stream instead of done at once."""

    def __init__(self, cuda: FakeCuda, data: torch.Tensor) -> None:
        self.cuda = cuda
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, piece: slice) -> "LaunchedBytes":
        return LaunchedBytes(self.cuda, self.data[piece])

    def copy_(self, source: torch.Tensor, *, non_blocking: bool) -> None:
        assert non_blocking, "a copy that blocks the host overlaps nothing"
        self.cuda.launch(lambda: self.data.copy_(source))


class FakeDeviceArena:
    """A SlotArena whose slots are written by queued copies only."""

    def __init__(self, arena: Any, cuda: FakeCuda) -> None:
        self._arena = arena
        self._cuda = cuda
        self.device = torch.device("cpu")

    def bytes_of(self, slot: int) -> LaunchedBytes:
        return LaunchedBytes(self._cuda, self._arena.bytes_of(slot))

"""A disk that tests stand in front of, and experts on it."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outrider.collect.schema import ModelShape
from outrider.runtime.experts.slots import SlotArena
from outrider.runtime.testing import SyntheticExperts, write_experts

SHAPE = ModelShape(
    num_moe_layers=1, num_experts=6, top_k=2, hidden_size=40, expert_size=24, fingerprint=""
)

Read = Callable[[int, list[memoryview], int], int]


class Disk:
    """Stands at os.preadv: keeps a log of (file name, offset), and lets a test answer a read."""

    def __init__(self, preadv: Read) -> None:
        self.preadv = preadv
        self.log: list[tuple[str, int]] = []
        self.answer: Read = preadv

    def __call__(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self.log.append((Path(f"/proc/self/fd/{fd}").readlink().name, offset))
        return self.answer(fd, buffers, offset)

    def gate(self, read: Read | None = None) -> "Gate":
        """A gate before `read`, or before the disk itself; it stands once it is the `answer`."""
        return Gate(read or self.preadv)


class Gate:
    """Blocks reads until each is let through; tells when one has arrived."""

    def __init__(self, preadv: Read) -> None:
        self.preadv = preadv
        self.arrived = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)

    def __call__(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self.arrived.release()
        assert self.allowed.acquire(timeout=20)
        return self.preadv(fd, buffers, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, python_reads: None) -> Disk:
    disk = Disk(os.preadv)
    monkeypatch.setattr(os, "preadv", disk)
    return disk


@pytest.fixture
def packed(tmp_path: Path) -> SyntheticExperts:
    return write_experts(tmp_path / "packed", SHAPE)


@pytest.fixture
def loose(tmp_path: Path) -> SyntheticExperts:
    """Experts at odd offsets of two files, as in a checkpoint."""
    return write_experts(tmp_path / "loose", SHAPE, is_packed=False)


@pytest.fixture
def arena(packed: SyntheticExperts) -> Iterator[SlotArena]:
    with SlotArena(SHAPE.num_experts, packed.views, packed.nbytes) as arena:
        for slot in range(arena.num_slots):
            arena.poison(slot)
        yield arena

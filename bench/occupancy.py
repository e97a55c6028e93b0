"""What a card should make of the compiled decode kernels: a calculation, verified by no card.

From registers, shared memory and loop lengths (kernels/compiled.json) follow how many programs a
multiprocessor holds, how many bytes they keep under way and how many instructions a byte costs; the
slowest of memory, latency and issue is the expected speed. Knows no tensors.
"""

from dataclasses import dataclass
from typing import Any, Protocol


class Compiled(Protocol):
    """The figures of one kernel that the calculation needs, as `kernels.aot.Figures` has them."""

    @property
    def registers(self) -> int: ...

    @property
    def shared_bytes(self) -> int: ...

    @property
    def num_warps(self) -> int: ...

    @property
    def loop_instructions(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU. Limits from NVIDIA's CUDA C++ programming guide; `latency_s` and `launch_s` are
    assumed."""

    title: str
    arch: int
    bytes_per_s: float
    num_multiprocessors: int
    clock_hz: float
    max_warps: int
    max_programs: int
    registers: int
    shared_bytes: int
    schedulers: int = 4
    latency_s: float = 600e-9
    launch_s: float = 3e-6


# 936 GB/s: 19.5 Gbit/s on 384 bits. 82 multiprocessors at 1.695 GHz boost (NVIDIA GA102 paper).
RTX_3090 = Card("RTX 3090", 86, 936e9, 82, 1.695e9, 48, 16, 65536, 100 << 10)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch: its figures, programs, bytes it reads, and bytes of one loop step."""

    figures: Compiled
    num_programs: int
    num_bytes: int
    step_bytes: int


@dataclass(frozen=True, slots=True)
class Expectation:
    """Expected time and share of the card's bandwidth, and what bounds the slowest launch."""

    seconds: float
    share: float
    bound: str

    def as_dict(self, card: Card) -> dict[str, Any]:
        """For JSON, with what it is."""
        return {
            "card": card.title,
            "share_of_bandwidth": self.share,
            "seconds": self.seconds,
            "bound": self.bound,
            "is_verified": False,
        }


def resident_programs(figures: Compiled, card: Card) -> int:
    """Programs that one multiprocessor holds at once; registers are given out by 8 a thread."""
    threads = 32 * figures.num_warps
    by_registers = card.registers // (-(-figures.registers // 8) * 8 * threads)
    # The system keeps 1 KiB of shared memory for each program.
    by_shared = card.shared_bytes // (figures.shared_bytes + 1024)
    return min(by_registers, by_shared, card.max_warps // figures.num_warps, card.max_programs)


def expected(launches: list[Launch], card: Card, *, num_other_launches: int = 0) -> Expectation:
    """Expected time of launches in a row, none overlapping another."""
    seconds = num_other_launches * card.launch_s
    slowest, bound = 0.0, "memory"
    for launch in launches:
        took, why = _launch_seconds(launch, card)
        seconds += took + card.launch_s
        if took > slowest:
            slowest, bound = took, why
    num_bytes = sum(launch.num_bytes for launch in launches)
    return Expectation(seconds, num_bytes / seconds / card.bytes_per_s, bound)


def _launch_seconds(launch: Launch, card: Card) -> tuple[float, str]:
    at_once = resident_programs(launch.figures, card) * card.num_multiprocessors
    issue = card.num_multiprocessors * card.schedulers * card.clock_hz
    instructions = launch.figures.loop_instructions * launch.figures.num_warps
    limits = {
        "memory": card.bytes_per_s,
        "issue": issue / instructions * launch.step_bytes,
    }
    slowest = min(limits, key=lambda name: limits[name])
    full, rest = divmod(launch.num_programs, at_once)
    program_bytes = launch.num_bytes / launch.num_programs
    seconds, bound = 0.0, slowest
    # A last wave fills no card and takes a time of its own; it names the bound only if it is all.
    for programs, times in ((at_once, full), (rest, 1)):
        if not programs or not times:
            continue
        under_way = programs * launch.step_bytes / card.latency_s
        if under_way < limits[slowest] and (programs == at_once or not full):
            bound = "latency"
        seconds += times * programs * program_bytes / min(limits[slowest], under_way)
    return seconds, bound

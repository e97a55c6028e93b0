"""What the compiler said of the Triton kernels: the committed table, readable without Triton.

`aot` makes it, `make aot` renews it; figures hold for the one compiler version that it names.
"""

import json
from dataclasses import dataclass
from pathlib import Path

COMPILED = Path(__file__).with_name("compiled.json")


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one variant: registers a thread, bytes spilled a thread, shared bytes a block, warps, the
    instructions of its longest loop, and how many loads of its PTX take 16 bytes at once."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    loop_instructions: int
    wide_loads: int


def variant_name(kernel: str, fmt: str, dtype: str, arch: int) -> str:
    """Key of one row: kernel, weight format, activation dtype, architecture (86)."""
    return f"{kernel}/{fmt}/{dtype}/sm_{arch}"


def read_table(path: Path = COMPILED) -> tuple[str, dict[str, Figures]]:
    """The compiler's version and the committed figures by variant name."""
    document = json.loads(path.read_text())
    return document["triton"], {name: Figures(**row) for name, row in document["variants"].items()}

"""Block sizes of the Triton kernels, looked up, never tuned at import.

Knows operations, formats, row lengths and architectures. The table shipped is by calculation and
compilation; entries that somebody measured on a card of their own go before it (`use_table`).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("blocks.json")


class BlockTableError(ValueError):
    """A block table that is not one."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sizes of one launch: weight rows, inputs, token rows a program; warps and pipeline stages."""

    block_n: int
    block_k: int
    block_m: int = 1
    num_warps: int = 4
    num_stages: int = 3

    def check(self) -> None:
        """Raise ValueError for sizes that no launch takes: they must be powers of two (stages: 1 up
        to 8)."""
        for name, value in asdict(self).items():
            is_power = isinstance(value, int) and value > 0 and value & (value - 1) == 0
            if name == "num_stages":
                is_power = isinstance(value, int) and 1 <= value <= 8
            if not is_power:
                raise ValueError(f"{name} {value!r} is no size of a launch")

    @property
    def options(self) -> dict[str, Any]:
        """Launch options; fused multiply-adds are asked for by name, whatever the default is."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


def table_key(op: str, fmt: str, k: int, arch: int | str) -> str:
    """Key of one entry: operation, format, inputs a row, architecture (86) or `any`."""
    return f"{op}/{fmt}/{k}/{arch}"


def block_sizes(op: str, fmt: str, k: int, *, device: torch.device) -> Blocks:
    """The entry for this card and row length, else for any card, else for any length.

    An entry given to `use_table` for exactly this card and length goes before all of them.
    """
    table = {**load_table(TABLE), **_measured}
    arch = _architecture(device)
    for key in (
        table_key(op, fmt, k, arch),
        table_key(op, fmt, k, "any"),
        table_key(op, fmt, 0, "any"),
    ):
        if key in table:
            return table[key]
    raise BlockTableError(f"{TABLE.name} has no entry for {op} in {fmt}")


_measured: dict[str, Blocks] = {}


def use_table(entries: Mapping[str, Blocks]) -> None:
    """Let these entries go before the shipped ones, for this process; replaces earlier ones."""
    _measured.clear()
    _measured.update(entries)


@contextmanager
def using_table(entries: Mapping[str, Blocks]) -> Iterator[None]:
    """`use_table` for as long as the block lasts."""
    before = dict(_measured)
    use_table(entries)
    try:
        yield
    finally:
        use_table(before)


@cache
def load_table(path: Path) -> Mapping[str, Blocks]:
    """Read a table. Raises BlockTableError if it is damaged, OSError if it is not there."""
    try:
        table = {key: Blocks(**sizes) for key, sizes in json.loads(path.read_text()).items()}
        for sizes in table.values():
            sizes.check()
        return table
    except (TypeError, AttributeError, ValueError) as error:
        raise BlockTableError(f"{path} is not a table of block sizes: {error}") from error


def save_table(path: Path, table: Mapping[str, Blocks]) -> None:
    """Write a table that `load_table` reads; entries in order of their keys."""
    entries = {key: asdict(table[key]) for key in sorted(table)}
    path.write_text(json.dumps(entries, indent=2) + "\n")
    load_table.cache_clear()


@cache
def _architecture(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor

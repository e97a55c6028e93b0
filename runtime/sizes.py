"""Memory sizes as users write them, and how many expert slots a budget buys.

Knows no device: how much memory there is, it is told.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from .errors import InsufficientMemoryError, UsageError

_BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS = {"": 1, "B": 1, **_BINARY, **_DECIMAL}
_NUMBER = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?([A-Za-z]{0,3}|%)")
_MAX_BYTES = 2**63 - 1
_ACCEPTED = "sizes such as 8GiB, 512MiB, 8GB, a plain number of bytes"
_ACCEPTED_BUDGETS = f"{_ACCEPTED}, 25% (of all routed experts), all, auto"


@dataclass(frozen=True, slots=True)
class ExpertBudget:
    """A budget for expert weights as asked for; `resolve` makes slots of it.

    `amount` is bytes for "bytes", percent of all routed experts for "percent" (exact, so that 29 %
    of 100 is 29), and 0 for "all" and "auto".
    """

    kind: Literal["bytes", "percent", "all", "auto"]
    amount: int | Fraction = 0

    def __str__(self) -> str:
        if self.kind == "bytes":
            return format_bytes(int(self.amount))
        return f"{float(self.amount):g}%" if self.kind == "percent" else self.kind


def parse_bytes(size: str | int) -> int:
    """Bytes of a size such as `8GiB`, `512MiB`, `8GB` or `1048576`; raises `UsageError`."""
    number, unit = _split(size, _ACCEPTED)
    return _whole_bytes(number, unit, size, accepted=_ACCEPTED)


def parse_budget(size: str | int) -> ExpertBudget:
    """The budget that a size, a percentage, `all` or `auto` asks for; raises `UsageError`."""
    if size == "all":
        return ExpertBudget("all")
    if size == "auto":
        return ExpertBudget("auto")
    number, unit = _split(size, _ACCEPTED_BUDGETS)
    if unit != "%":
        return ExpertBudget("bytes", _whole_bytes(number, unit, size, accepted=_ACCEPTED_BUDGETS))
    if number > 100:
        raise UsageError(f"{size} of all routed experts: accepted is above 0% up to 100%")
    return ExpertBudget("percent", number)


def resolve(
    budget: ExpertBudget,
    *,
    slot_bytes: int,
    num_experts_total: int,
    available_bytes: int,
    auto_bytes: int | None = None,
    total_bytes: int | None = None,
) -> int:
    """Number of expert slots, 1 to `num_experts_total`, that a budget buys.

    `available_bytes` is what the device has left for experts after dense weights, KV cache and
    reserve; `auto_bytes` what `auto` may take of it (default: all of it); `total_bytes` the whole
    memory of the device. More than all experts is clamped to all of them, unless the bytes asked
    for exceed the device itself.

    Raises `UsageError` for a budget below one expert, `InsufficientMemoryError` with both sizes for
    one that does not fit.
    """
    if budget.kind == "auto":
        limit = available_bytes if auto_bytes is None else min(auto_bytes, available_bytes)
        if limit < slot_bytes:
            raise InsufficientMemoryError(
                f"expert memory auto: one expert takes {format_bytes(slot_bytes)} and "
                f"{format_bytes(max(limit, 0))} of memory may be used for experts"
            )
        return min(num_experts_total, limit // slot_bytes)

    if budget.kind == "bytes":
        if total_bytes is not None and budget.amount > total_bytes:
            raise InsufficientMemoryError(
                f"expert memory {budget}: the device has {format_bytes(total_bytes)} in all, and "
                f"all {num_experts_total} experts take "
                f"{format_bytes(slot_bytes * num_experts_total)}"
            )
        num_slots = int(budget.amount) // slot_bytes
    elif budget.kind == "percent":
        num_slots = math.floor(budget.amount * num_experts_total / 100)
    else:
        num_slots = num_experts_total
    if num_slots < 1:
        raise UsageError(
            f"expert memory {budget} is less than one expert: the smallest budget for this model "
            f"is {slot_bytes} bytes ({format_bytes(slot_bytes)}) or "
            f"{_smallest_percent(num_experts_total)}%"
        )
    num_slots = min(num_slots, num_experts_total)
    if num_slots * slot_bytes > available_bytes:
        raise InsufficientMemoryError(
            f"expert memory {budget}: {num_slots} experts take "
            f"{format_bytes(num_slots * slot_bytes)} and {format_bytes(max(available_bytes, 0))} "
            "are free for experts; give a smaller --expert-memory, or auto"
        )
    return num_slots


def format_bytes(num_bytes: int) -> str:
    """A size for people, in binary units, three digits or more: `512 B`, `1.50 GiB`."""
    if abs(num_bytes) < 1024:
        return f"{num_bytes} B"
    size, units = num_bytes / 1024, ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    # 1023.5 would be printed as 1024 of the smaller unit.
    while abs(size) >= 1023.5 and len(units) > 1:
        size /= 1024
        del units[0]
    digits = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{digits}f} {units[0]}"


def _split(size: object, accepted: str) -> tuple[Fraction, str]:
    if isinstance(size, int) and not isinstance(size, bool):
        if not 0 < size <= _MAX_BYTES:
            raise UsageError(f"a size of {size} bytes: accepted is 1 to {_MAX_BYTES}")
        return Fraction(size), ""
    match = _NUMBER.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is None:
        raise UsageError(f"{_shown(size)} is not a size: accepted are {accepted}")
    if not (number := Fraction(match[1])):
        raise UsageError(f"a size of {size}: accepted is more than nothing")
    return number, match[2].upper()


def _whole_bytes(number: Fraction, unit: str, size: object, *, accepted: str) -> int:
    if unit not in _UNITS:
        hint = f"{unit}IB".replace("IB", "iB") if f"{unit}IB" in _BINARY else None
        ambiguous = f" ({unit} is ambiguous, write {hint} or {unit}B)" if hint else ""
        raise UsageError(f"{_shown(size)} is not a size{ambiguous}: accepted are {accepted}")
    if not unit and number.denominator != 1:
        raise UsageError(f"{_shown(size)} bytes is not whole: accepted are {accepted}")
    num_bytes = int(number * _UNITS[unit])
    if not 0 < num_bytes <= _MAX_BYTES:
        raise UsageError(f"{_shown(size)} is {num_bytes} bytes: accepted is 1 to {_MAX_BYTES}")
    return num_bytes


def _smallest_percent(num_experts_total: int) -> str:
    # Rounded up to a thousandth, so that what is printed is accepted.
    return f"{math.ceil(Fraction(100_000, num_experts_total)) / 1000:g}"


def _shown(size: object) -> str:
    text = repr(size)
    return text if len(text) <= 60 else f"{text[:60]}..."

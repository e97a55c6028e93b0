"""The space of a sweep: which options of training vary, and over what. Searches nothing.

A field is a list of values to choose from, a range `{low, high}` with `log` or `step` if wanted,
or one value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import msgspec

from .base import family_class
from .errors import SettingsError
from .presets import Settings, make_settings

PREDICTOR = "predictor"
MAX_BYTES = 64 * 1024
# The seed of all trials is the sweep's, so that options are compared and not luck.
_FIXED = ("preset", "seed")
_FIELDS = tuple(name for name in Settings.__struct_fields__ if name not in _FIXED)
_FORM = "a list of values, {low: A, high: B}, or one value"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of `values`."""

    values: tuple[str | int | float | bool, ...]

    def ends(self) -> tuple[Any, ...]:
        return self.values


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From `low` to `high`, both included: in steps, by magnitude (`log`), or evenly."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    is_whole: bool = False

    def ends(self) -> tuple[Any, ...]:
        """The lowest, the next to it and the highest value."""
        step = self.step or (1 if self.is_whole else 0)
        kind = int if self.is_whole else float
        return tuple(kind(one) for one in (self.low, min(self.low + step, self.high), self.high))


Space = dict[str, Choice | Range]


def read_space(path: Path) -> dict[str, Any]:
    """The file's fields as they are written. SettingsError where it is no mapping."""
    import yaml

    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        found = yaml.safe_load(text) if len(text) <= MAX_BYTES else None
    except OSError as error:
        raise SettingsError(f"sweep {str(path)!r} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        first = " ".join(str(error).split())
        raise SettingsError(f"sweep {str(path)!r} is not YAML: {first}") from None
    if not isinstance(found, dict) or not found:
        raise SettingsError(
            f"sweep {str(path)!r}: accepted is a mapping of fields, each {_FORM}, such as "
            "'lr: {low: 0.0005, high: 0.005, log: true}'"
        )
    return {str(name): value for name, value in found.items()}


def make_space(
    written: Mapping[str, Any], *, preset: str = "small", given: Mapping[str, Any] | None = None
) -> Space:
    """What the fields of a file mean; every end of theirs is valid beside what is `given`.

    SettingsError in one line that names the field.
    """
    given = given or {}
    beside = {name: value for name, value in given.items() if name != PREDICTOR}
    space: Space = {}
    for name, value in written.items():
        if name in _FIXED or name not in (*_FIELDS, PREDICTOR):
            raise SettingsError(
                f"sweep: {name!r} cannot vary; fields that can: {', '.join((PREDICTOR, *_FIELDS))}"
            )
        if name in given:
            raise SettingsError(f"sweep: {name!r} varies and is also given as an option; drop one")
        space[name] = _dimension(name, value)
    for name, one in space.items():
        if name == PREDICTOR:
            for family in one.ends():
                family_class(str(family))
        elif name not in ("width", "heads"):
            _check(space, (name,), preset=preset, given=beside)
    together = tuple(name for name in ("width", "heads") if name in space)
    _check(space, together, preset=preset, given=beside)
    return space


def _check(space: Space, names: Sequence[str], *, preset: str, given: Mapping[str, Any]) -> None:
    for values in product(*(space[name].ends() for name in names)):
        try:
            make_settings(preset, {**given, **dict(zip(names, values, strict=True))})
        except SettingsError as error:
            raise SettingsError(f"sweep: {' and '.join(names)}: {error}") from None


def _dimension(name: str, value: object) -> Choice | Range:
    kind = str if name == PREDICTOR else _kind(name)
    if isinstance(value, dict):
        return _range(name, value, kind=kind)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise SettingsError(f"sweep: {name} has no values; accepted is {_FORM}")
    return Choice(tuple(dict.fromkeys(_value(name, one, kind=kind) for one in values)))


def _range(name: str, value: Mapping[Any, Any], *, kind: type) -> Range:
    if kind not in (int, float):
        raise SettingsError(f"sweep: {name} has no range; accepted is a list of values")
    try:
        found = msgspec.convert(
            {str(key): one for key, one in value.items() if key != "is_whole"}, Range, strict=False
        )
    except msgspec.ValidationError as error:
        raise SettingsError(
            f"sweep: {name}: {error}; accepted are low, high, log and step"
        ) from None
    numbers = [found.low, found.high, *([] if found.step is None else [found.step])]
    if not all(map(math.isfinite, numbers)) or found.low > found.high:
        raise SettingsError(f"sweep: {name}: low {found.low:g} to high {found.high:g} is no range")
    if found.step is not None and (found.step <= 0.0 or found.log):
        raise SettingsError(f"sweep: {name}: step is above 0, and not together with log")
    if found.log and found.low <= 0.0:
        raise SettingsError(f"sweep: {name}: log needs a low above 0, not {found.low:g}")
    if kind is int and any(not float(one).is_integer() for one in numbers):
        raise SettingsError(f"sweep: {name} is a whole number; low, high and step must be, too")
    return msgspec.structs.replace(found, is_whole=kind is int)


def _value(name: str, value: object, *, kind: type) -> Any:
    # YAML 1.1 reads 1e-3 as a word; a switch is no number.
    is_plain = isinstance(value, (str, int, float)) and (
        kind is bool or not isinstance(value, bool)
    )
    try:
        if not is_plain:
            raise ValueError
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        found = kind(value)  # type: ignore[arg-type]
        if kind is int and float(value) != found:  # type: ignore[arg-type]
            raise ValueError
    except (ValueError, OverflowError):
        wanted = {str: "a word", int: "a whole number", float: "a number", bool: "true or false"}
        raise SettingsError(f"sweep: {name}: {value!r} is not {wanted[kind]}") from None
    return found


def _kind(name: str) -> type:
    for field in msgspec.structs.fields(Settings):
        if field.name == name and isinstance(field.type, type):
            return field.type
    return str

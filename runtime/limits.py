"""The bounds of everything a client may ask for, in one table, with the checks of single values.

Knows no request and no model. Each check returns the plain value or raises `FieldError` naming the
field, the value given and the accepted range.
"""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import NamedTuple

from .errors import FieldError


class Limit(NamedTuple):
    """An accepted range; `above` excludes the minimum itself. `str()` says it in words."""

    minimum: float
    maximum: float
    above: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, (int, float)) or not value <= self.maximum:
            return False
        return value > self.minimum if self.above else value >= self.minimum

    def __str__(self) -> str:
        return f"{'above' if self.above else 'from'} {self.minimum:,} to {self.maximum:,}"


# Every bound that a request is held to. Names without a field of their own bound lengths.
LIMITS: dict[str, Limit] = {
    "max_tokens": Limit(1, 1_000_000),
    "temperature": Limit(0.0, 100.0),
    "top_p": Limit(0.0, 1.0, above=True),
    "top_k": Limit(0, 1_000_000),
    "min_p": Limit(0.0, 1.0),
    "presence_penalty": Limit(-2.0, 2.0),
    "frequency_penalty": Limit(-2.0, 2.0),
    "repetition_penalty": Limit(0.01, 100.0),
    "seed": Limit(0, 2**63 - 1),
    "logprobs": Limit(0, 20),
    "deadline_ms": Limit(1, 86_400_000),
    "token_id": Limit(0, 2**31 - 1),
    "num_stop": Limit(0, 16),
    "stop_chars": Limit(1, 256),
    "num_stop_token_ids": Limit(0, 64),
    "prompt_chars": Limit(1, 2**20),
    "num_messages": Limit(1, 1024),
    "num_prompt_token_ids": Limit(1, 2**20),
}

_MAX_SHOWN = 60


def shown(value: object) -> str:
    """`repr`, cut: an error message must not carry a megabyte, nor fail on a huge integer."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (str, bytes, list, tuple)) and len(value) > _MAX_SHOWN:
        return f"{value[:_MAX_SHOWN]!r}... ({len(value)} long)"
    text = repr(value)
    return text if len(text) <= 2 * _MAX_SHOWN else f"{text[: 2 * _MAX_SHOWN]}..."


def refusal(field: str, value: object, accepted: str) -> FieldError:
    """The error for one value; `field` may carry a position, as in `stop[3]`."""
    name = field.split("[")[0].split(".")[0]
    return FieldError(name, f"{field} is {shown(value)}: accepted is {accepted}")


def check_integer(field: str, value: object, *, limit: Limit | None = None) -> int:
    """A whole number (numpy's too, but no bool) within `limit`, else within LIMITS[field]."""
    limit = limit or LIMITS[field]
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) not in limit:
        raise refusal(field, value, f"a whole number {limit}")
    return int(value)


def check_integers(field: str, values: Iterable[object], *, limit: Limit) -> tuple[int, ...]:
    """Whole numbers within `limit`; a million of them take a tenth of a second."""
    low, high = limit.minimum, limit.maximum
    return tuple(
        value
        if type(value) is int and low <= value <= high
        else check_integer(f"{field}[{position}]", value, limit=limit)
        for position, value in enumerate(values)
    )


def check_number(field: str, value: object) -> float:
    """A finite number within LIMITS[field], as a float."""
    limit = LIMITS[field]
    accepted = f"a finite number {limit}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise refusal(field, value, accepted)
    try:
        number = float(value)
    except OverflowError:
        raise refusal(field, value, accepted) from None
    if not math.isfinite(number) or number not in limit:
        raise refusal(field, value, accepted)
    return number


def check_bool(field: str, value: object) -> None:
    """True or false itself, nothing that is merely truthy."""
    if not isinstance(value, bool):
        raise refusal(field, value, "true or false")


def check_length(field: str, length: int, limit_name: str, *, unit: str) -> None:
    """A length, in `unit`, within LIMITS[limit_name]."""
    limit = LIMITS[limit_name]
    if length == 0 and limit.minimum > 0:
        raise FieldError(field, f"{field} is empty: accepted are {limit} {unit}")
    if length not in limit:
        raise FieldError(field, f"{field} has {length} {unit}: accepted are {limit}")


def check_text(field: str, value: object) -> None:
    """A string that UTF-8 can encode: no lone surrogates. NUL is a character like others."""
    if not isinstance(value, str):
        raise refusal(field, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FieldError(
            field.split(".")[0],
            f"{field} holds a lone surrogate, {value[error.start]!r}, at character {error.start}: "
            "accepted is text that can be encoded as UTF-8",
        ) from None

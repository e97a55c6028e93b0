"""Medians with intervals that assume no distribution. Knows numbers only."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from statistics import median

WANTED_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of `count` values and an interval that covers the true one with `confidence`."""

    median: float
    low: float
    high: float
    confidence: float
    count: int

    def as_dict(self) -> dict[str, float | int]:
        """The fields, for JSON."""
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """Median and order-statistic interval: the narrowest symmetric one that reaches 95 %.

    Where there are too few values for that (below 6), smallest to largest, whose confidence for n
    values is 1 - 2^(1 - n): 94 % for 5. ValueError for none.
    """
    if not values:
        raise ValueError("no values, so no median")
    ordered = sorted(values)
    count = len(ordered)
    cut = 0
    while cut + 1 <= (count - 1) // 2 and _confidence(count, cut + 1) >= WANTED_CONFIDENCE:
        cut += 1
    return Spread(
        median=float(median(ordered)),
        low=float(ordered[cut]),
        high=float(ordered[count - 1 - cut]),
        confidence=_confidence(count, cut),
        count=count,
    )


def paired_ratio(values: Sequence[float], references: Sequence[float]) -> Spread:
    """Spread of value / reference, each pair taken side by side. ValueError for unequal lengths."""
    return spread([value / other for value, other in zip(values, references, strict=True)])


def _confidence(count: int, cut: int) -> float:
    # The median lies outside when at most `cut` values fall on one of its sides.
    outside = sum(comb(count, below) for below in range(cut + 1)) / 2**count
    return max(0.0, 1.0 - 2.0 * outside)

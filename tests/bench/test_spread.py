"""Intervals of medians against the definition, by counting coin tosses and by sampling."""

from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.bench.spread import paired_ratio, spread

VALUES = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=40)


@given(VALUES)
def test_the_interval_holds_the_median_and_comes_from_the_values(values: list[float]) -> None:
    found = spread(values)
    assert found.low in values and found.high in values
    assert found.low <= found.median <= found.high
    assert found.count == len(values)


@given(VALUES, st.randoms())
def test_order_does_not_matter(values: list[float], random: Random) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)
    assert spread(values) == spread(shuffled)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 9, 12])
def test_confidence_is_the_share_of_coin_tosses_that_leave_the_median_inside(count: int) -> None:
    """Each value lies below the true median or above it, like a coin; all tosses are tried."""
    found = spread([float(place) for place in range(count)])
    low, high = int(found.low), int(found.high)
    inside = 0
    for toss in product((False, True), repeat=count):
        num_below = sum(toss)  # that many of the sorted values are below the true median
        inside += low < num_below <= high
    assert found.confidence == pytest.approx(inside / 2**count)


def test_five_values_give_their_range_and_nine_leave_out_the_outliers() -> None:
    assert (spread([3, 1, 9, 2, 5]).low, spread([3, 1, 9, 2, 5]).high) == (1, 9)
    nine = spread([1, 2, 3, 4, 5, 6, 7, 8, 1000])
    assert (nine.low, nine.median, nine.high) == (2, 5, 8)
    assert nine.confidence >= 0.95


def test_ratios_are_paired_before_the_median_is_taken() -> None:
    found = paired_ratio([1.0, 20.0, 300.0], [1.0, 10.0, 100.0])
    assert (found.low, found.median, found.high) == (1.0, 2.0, 3.0)
    with pytest.raises(ValueError):
        paired_ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError):
        spread([])

"""The bound's arithmetic, and LRU misses against an independent replay by stack distance."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.bench.bandwidth import drop_page_cache, link_bandwidth
from outrider.bench.records import Bandwidths, Measurement
from outrider.bench.roofline import Pass, Roofline, lru_misses
from outrider.bench.rows import Runs, link_speed

NUM_EXPERTS = 6
LAYERS = 3
ONE_PASS = st.builds(
    Pass,
    st.booleans(),
    st.lists(
        st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=3, unique=True).map(sorted),
        min_size=LAYERS,
        max_size=LAYERS,
    ),
)
PASSES = st.lists(ONE_PASS, min_size=1, max_size=8)


def stack_distance_misses(uses: list[tuple[object, bool]], num_slots: int) -> int:
    """A use misses if as many other keys were used since its last use as there are slots."""
    misses = 0
    for place, (key, is_counted) in enumerate(uses):
        earlier = [other for other, _ in uses[:place]]
        if key in earlier:
            last = len(earlier) - 1 - earlier[::-1].index(key)
            is_hit = len(set(earlier[last + 1 :])) < num_slots
        else:
            is_hit = False
        misses += is_counted and not is_hit
    return misses


def uses_of(passes: list[Pass], *, counted: bool, layer: int | None = None) -> list:
    return [
        ((at, expert), counted and one.is_decode)
        for one in passes
        for at, experts in enumerate(one.layers)
        for expert in experts
        if layer in (None, at)
    ]


@given(PASSES, st.integers(1, LAYERS * NUM_EXPERTS), st.booleans())
def test_the_better_of_global_and_per_layer_lru_is_counted_in_decode_only(
    passes: list[Pass], num_slots: int, is_warm: bool
) -> None:
    def misses(layer: int | None, slots: int) -> int:
        before = uses_of(passes, counted=False, layer=layer) if is_warm else []
        uses = before + uses_of(passes, counted=True, layer=layer)
        if not slots:
            return sum(counted for _, counted in uses)
        return stack_distance_misses(uses, slots)

    quotas = [
        (layer + 1) * num_slots // LAYERS - layer * num_slots // LAYERS for layer in range(LAYERS)
    ]
    per_layer = sum(misses(layer, quota) for layer, quota in enumerate(quotas))
    found = lru_misses(passes, num_slots=num_slots, num_experts=NUM_EXPERTS, is_warm=is_warm)
    assert found == min(misses(None, num_slots), per_layer)


def test_all_resident_misses_nothing_once_warm() -> None:
    passes = [Pass(True, [[0, 1], [2, 3]]), Pass(True, [[4, 5], [0, 1]])]
    assert lru_misses(passes, num_slots=12, num_experts=6, is_warm=True) == 0
    assert lru_misses(passes, num_slots=12, num_experts=6, is_warm=False) == 8


def test_the_slower_of_compute_and_link_bounds() -> None:
    compute_bound = Roofline(2e9, 1e8, read_bytes_per_s=20e9, link_bytes_per_s=1e9)
    assert compute_bound.tokens_per_second == pytest.approx(10.0)
    link_bound = Roofline(2e9, 5e8, read_bytes_per_s=20e9, link_bytes_per_s=1e9)
    assert link_bound.tokens_per_second == pytest.approx(2.0)


def test_link_is_measured_on_files_of_any_size_and_their_pages_can_be_dropped(
    tmp_path: Path,
) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x" * 100)
    large.write_bytes(b"y" * (3 << 20))
    assert link_bandwidth([small, large]).bytes_per_s > 1e6
    large.read_bytes()
    assert 0.0 <= drop_page_cache([small, large]) <= 1.0
    with pytest.raises(ValueError, match="smaller than a block"):
        link_bandwidth([small])


def moving(*rates: int, limit: int | None = None) -> Runs:
    """Runs of an arm that read experts this fast, ten tokens in two seconds each."""
    return Runs(
        arm="on-demand", budget="25%", is_cold=False, subject=None, pages_kept=0.0,  # type: ignore[arg-type]
        has_identical_logits=True, memory_limit_bytes=None, fence="none", agreement=1.0,
        link_limit_bytes_per_s=limit,
        measurements=[
            Measurement([], 10, 2.0, 0.1, 1.0,
                        {"bytes_on_demand": rate, "bytes_prefetched": rate}, 1)
            for rate in rates
        ],
    )  # fmt: skip


def test_a_link_is_no_slower_than_what_an_arm_moved_over_it() -> None:
    probes = [Bandwidths(10.0, link, "direct") for link in (90.0, 100.0, 300.0)]
    other = replace(moving(1), measurements=[Measurement([], 10, 2.0, 0.1, 0.0, {}, 1)])
    assert link_speed(probes, [other, moving(80, 70, 60)]) == 100.0
    assert link_speed(probes, [moving(20, 30, 40), moving(900, 150, 140), other]) == 150.0
    # One fast second proves less than the median; a throttled link is as fast as it is let.
    assert link_speed(probes, [moving(900, 10, 10)]) == 100.0
    assert link_speed(probes, [moving(900, 900, 900, limit=120)]) == 120.0
    # What came from the page cache says nothing of the disk.
    buffered = [replace(one, reads="buffered") for one in probes]
    assert link_speed(buffered, [moving(900, 900, 900)]) == 100.0

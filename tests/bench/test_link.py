"""The link on a virtual clock: cases computed by hand, and work that is conserved in any order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.bench.link import VirtualLink
from outrider.collect.schema import ExpertKey
from outrider.runtime.errors import TransferError
from outrider.runtime.experts.cache import Kind
from outrider.runtime.testing import VirtualClock

MS = 1e-3


def link_of(*, latency_s: float = 0.0, piece_bytes: int = 100) -> VirtualLink:
    """1000 bytes take 1 ms, a piece of 100 bytes 0.1 ms."""
    return VirtualLink(
        VirtualClock(), nbytes=1000, bytes_per_s=1e6, latency_s=latency_s, piece_bytes=piece_bytes
    )


def copy(link: VirtualLink, expert_idx: int, kind: Kind = Kind.ON_DEMAND):
    return link.submit(ExpertKey(0, expert_idx), expert_idx, kind)


def test_copies_are_sent_one_after_the_other_and_their_latencies_overlap():
    link = link_of(latency_s=0.5 * MS)
    first, second = copy(link, 0), copy(link, 1)
    first.wait()
    assert link._clock.now == pytest.approx(1.5 * MS) and not second.done()
    second.wait()
    assert link._clock.now == pytest.approx(2.5 * MS)
    assert first.done() and link.copied[Kind.ON_DEMAND] == 2
    assert link.arrivals(2) == pytest.approx([1.5 * MS, 2.5 * MS])


def test_speed_is_what_an_engine_would_measure():
    """Bytes over the time in which some copy was under way, its latency included."""
    link = link_of(latency_s=0.5 * MS)
    assert link.bandwidth() == 0.0
    copies = [copy(link, 0), copy(link, 1)]
    for one in copies:
        one.wait()
    assert link.bandwidth() == pytest.approx(2000 / (2.5 * MS))
    link._clock.advance(7 * MS)
    copy(link, 2).wait()
    assert link.bandwidth() == pytest.approx(3000 / (4.0 * MS))


def test_what_is_on_its_way_is_outstanding_and_cannot_be_cancelled():
    link = link_of(latency_s=0.5 * MS)
    one = copy(link, 0)
    link._clock.advance(1.2 * MS)
    assert link.outstanding_bytes() == 1000 and not one.cancel()
    link._clock.advance(0.4 * MS)
    assert link.outstanding_bytes() == 0 and one.done()
    assert (one.began_s, one.ended_s) == pytest.approx((0.0, 1.5 * MS))


def test_idle_link_does_nothing_until_it_is_asked():
    link = link_of()
    link._clock.advance(5 * MS)
    one = copy(link, 0)
    assert not one.done() and link.outstanding_bytes() == 1000
    one.wait()
    assert link._clock.now == pytest.approx(6 * MS)


def test_waiting_for_what_ended_long_ago_takes_no_time():
    link = link_of()
    one = copy(link, 0)
    link._clock.advance(5 * MS)
    one.wait()
    assert link._clock.now == 5 * MS


def test_on_demand_overtakes_a_prefetch_when_its_piece_ends():
    link = link_of()
    ahead = copy(link, 0, Kind.PREFETCH)
    link._clock.advance(0.25 * MS)
    urgent = copy(link, 1)
    urgent.wait()
    # The piece under way ends at 0.3 ms, then a whole copy.
    assert link._clock.now == pytest.approx(1.3 * MS)
    assert not ahead.done()
    ahead.wait()
    assert link._clock.now == pytest.approx(2.0 * MS)


def test_promoted_prefetch_goes_before_those_queued_earlier():
    link = link_of()
    copies = [copy(link, index, Kind.PREFETCH) for index in range(3)]
    link.promote(copies[2])
    copies[2].wait()
    assert link._clock.now == pytest.approx(1.0 * MS)
    copies[1].wait()
    assert link._clock.now == pytest.approx(3.0 * MS)


def test_only_what_has_not_begun_is_cancelled():
    link = link_of()
    running, queued = copy(link, 0, Kind.PREFETCH), copy(link, 1, Kind.PREFETCH)
    link._clock.advance(0.01 * MS)
    assert not running.cancel() and queued.cancel() and not queued.cancel()
    with pytest.raises(TransferError, match="cancelled"):
        queued.wait()
    running.wait()
    assert link.copied[Kind.PREFETCH] == 1


def test_closed_link_ends_everything_and_takes_nothing():
    link = link_of()
    one = copy(link, 0)
    link.close()
    with pytest.raises(TransferError):
        one.wait()
    with pytest.raises(TransferError, match="closed"):
        copy(link, 1)


@pytest.mark.parametrize(
    "wrong", [{"nbytes": 0}, {"bytes_per_s": 0.0}, {"bytes_per_s": float("nan")}, {"latency_s": -1}]
)
def test_link_that_carries_nothing_is_refused(wrong):
    values = {"nbytes": 10, "bytes_per_s": 1.0} | wrong
    with pytest.raises(ValueError, match="above 0"):
        VirtualLink(VirtualClock(), **values)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["demand", "ahead", "pass", "promote", "wait"]), st.integers(0, 9)),
    max_size=40,
)


@given(ACTIONS)
def test_link_is_never_idle_with_work_and_never_does_more(actions):
    """All is sent when the work given so far ends, whatever overtakes what, and then arrives."""
    latency_s = 0.2 * MS
    link = link_of(latency_s=latency_s, piece_bytes=300)
    copies, submitted, ends_s = [], [], 0.0
    for action, number in actions:
        now = link._clock.now
        if action in ("demand", "ahead"):
            kind = Kind.ON_DEMAND if action == "demand" else Kind.PREFETCH
            copies.append(copy(link, len(copies), kind))
            submitted.append(now)
            ends_s = max(ends_s, now) + 1.0 * MS
        elif action == "pass":
            link._clock.advance(number * 0.17 * MS)
        elif copies and action == "promote":
            link.promote(copies[number % len(copies)])
        elif copies:
            copies[number % len(copies)].wait()
            assert link._clock.now <= max(now, ends_s + latency_s) + 1e-9
        left_s = max(0.0, ends_s - link._clock.now)
        left = link.outstanding_bytes() - 1000 * len(link._arriving)
        assert left == pytest.approx(left_s / MS * 1000, abs=1.0)
    for one in copies:
        one.wait()
    assert link.outstanding_bytes() == 0
    assert link._clock.now >= ends_s - 1e-9
    assert sum(link.copied.values()) == len(copies)
    for one, at_s in zip(copies, submitted, strict=True):
        assert one.began_s >= at_s - 1e-9
        assert one.ended_s >= one.began_s + 1.0 * MS + latency_s - 1e-9
    if copies:
        assert max(one.ended_s for one in copies) == pytest.approx(ends_s + latency_s)
        spans = [(one.began_s, one.ended_s) for one in copies]
        if _covered(spans) < link._meter.WINDOW_S:
            expected = 1000 * len(copies) / _covered(spans)
            assert link.bandwidth() == pytest.approx(expected)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of a union of intervals."""
    total = end = 0.0
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total

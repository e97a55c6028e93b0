"""Figures of several engines added up; no Ray, no engine."""

import msgspec
from scripted_client import make_stats

from outrider.runtime.scaleout.fleet import SILENT_S, Figures
from outrider.runtime.serving.messages import Histogram, Stats


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def _stats(instance: str, **changes: object) -> Stats:
    histogram = Histogram(bounds=(0.1, 1.0), counts=(1, 2, 3), sum=4.5, count=6)
    base = make_stats()
    return msgspec.structs.replace(
        base, instance=instance, time_to_first_token_seconds=histogram, **changes
    )


def test_sums_are_of_all_engines_and_states_of_the_living():
    clock = Clock()
    figures = Figures(clock=clock)
    figures.tell(
        _stats("a", generation_tokens_total=7, requests_running=2, requests_total={"stop": 3},
               is_ready=True, state="ready", expert_cache_bytes=10)
    )  # fmt: skip
    figures.tell(
        _stats("b", generation_tokens_total=5, requests_running=1, is_ready=False,
               requests_total={"stop": 1, "length": 2}, state="stalled", expert_cache_bytes=4)
    )  # fmt: skip
    both = figures.stats()
    assert (both.generation_tokens_total, both.requests_running) == (12, 3)
    assert both.requests_total == {"stop": 4, "length": 2}
    assert both.time_to_first_token_seconds.counts == (2, 4, 6)
    assert both.time_to_first_token_seconds.count == 12
    assert (both.state, both.is_ready, both.expert_cache_bytes) == ("ready", True, 14)
    clock.now += SILENT_S
    figures.tell(_stats("b", generation_tokens_total=6, state="stalled", is_ready=False,
                        requests_running=1, expert_cache_bytes=4))  # fmt: skip
    alone = figures.stats()
    # What the silent one has done stays counted; what it was doing is not true any more.
    assert (alone.generation_tokens_total, alone.requests_running) == (13, 1)
    assert (alone.state, alone.is_ready, alone.expert_cache_bytes) == ("stalled", False, 4)
    assert figures.num_live() == 1


def test_no_engine_at_all_is_dead_and_counts_nothing():
    figures = Figures()
    assert figures.num_live() == 0
    none = figures.stats()
    assert (none.state, none.is_ready, none.requests_started_total) == ("dead", False, 0)

"""The figures of several engines as those of one: what each last said, added up. Knows no Ray.

Counters of an engine that is gone stay in the sums, so that no sum ever falls; what is true of an
engine only while it lives, its running requests for instance, is left out once it is silent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from ..serving.messages import Histogram, ServerState, Stats

# An engine that has said nothing for so long counts as gone.
SILENT_S = 5.0

# Best first: the fleet is as well as its best engine.
_STATES: tuple[ServerState, ...] = ("ready", "stalled", "failing", "draining", "dead")
_TOTALS = tuple(name for name in Stats.__struct_fields__ if name.endswith("_total"))
_HISTOGRAMS = tuple(
    name
    for name in Stats.__struct_fields__
    if name.endswith("_seconds") and name not in ("uptime_seconds",)
)


class Figures:
    """The last STATS of every engine that there ever was, by its instance."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._last: dict[str, tuple[float, Stats]] = {}
        self._clock = clock
        self._since = clock()

    def tell(self, stats: Stats) -> None:
        """An engine's figures as they are now."""
        self._last[stats.instance] = (self._clock(), stats)

    def num_live(self) -> int:
        """Engines that spoke lately."""
        return len(self._live())

    def stats(self) -> Stats:
        """All engines together; `residency` is left out, since each has its own."""
        live, every = self._live(), [stats for _, stats in self._last.values()]
        ready = [stats for stats in live if stats.is_ready]
        sums: dict[str, Any] = {
            name: _added([getattr(stats, name) for stats in every], name) for name in _TOTALS
        }
        for name in _HISTOGRAMS:
            sums[name] = _together([getattr(stats, name) for stats in every])
        return Stats(
            state=_best(live),
            is_ready=bool(ready),
            instance="+".join(sorted(stats.instance[:8] for stats in live)),
            uptime_seconds=self._clock() - self._since,
            requests_running=sum(stats.requests_running for stats in live),
            requests_waiting=sum(stats.requests_waiting for stats in live),
            expert_cache_bytes=sum(stats.expert_cache_bytes for stats in live),
            degraded=any(stats.degraded for stats in live),
            num_moe_layers=0,
            num_experts=0,
            residency=b"",
            **sums,
        )

    def _live(self) -> list[Stats]:
        now = self._clock()
        return [stats for told, stats in self._last.values() if now - told < SILENT_S]


def _best(live: Iterable[Stats]) -> ServerState:
    found = {stats.state for stats in live}
    for state in _STATES:
        if state in found:
            return state
    return "dead"


def _added(values: Iterable[Any], name: str) -> Any:
    if "dict" not in str(Stats.__annotations__[name]):
        return sum(values)
    counts: dict[str, int] = {}
    for one in values:
        for key, count in one.items():
            counts[key] = counts.get(key, 0) + count
    return counts


def _together(histograms: list[Histogram]) -> Histogram:
    if not histograms:
        return Histogram(bounds=(), counts=(0,), sum=0.0, count=0)
    columns = zip(*(one.counts for one in histograms), strict=True)
    return Histogram(
        bounds=histograms[0].bounds,
        counts=tuple(sum(column) for column in columns),
        sum=sum(one.sum for one in histograms),
        count=sum(one.count for one in histograms),
    )

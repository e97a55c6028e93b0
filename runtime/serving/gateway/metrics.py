"""/metrics in Prometheus' text format, made from one STATS message at each scrape.

The server counts; nothing of its counts is kept or added up here, so two scrapes, or two gateways
in front of one server, count nothing twice. The gateway's own HTTP answers are its own counter.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from ..messages import Histogram, Stats

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_GAUGES = {
    "requests_running": "Requests that the engine works on.",
    "requests_waiting": "Requests that wait for their turn.",
    "expert_cache_bytes": "Bytes of expert weights in memory.",
    "degraded": "1 while part of the engine is out of order and it goes on without.",
}
_COUNTERS = {
    "requests_started": "Requests accepted.",
    "prompt_tokens": "Prompt tokens of accepted requests.",
    "prompt_tokens_cached": "Those of them that an earlier request had computed.",
    "generation_tokens": "Tokens generated.",
    "expert_stall_seconds": "Seconds that computing waited for experts.",
}
_LABELLED = {
    "requests": ("finish_reason", "Requests ended, by how."),
    "expert_lookups": ("result", "Experts looked up: one for each step, layer and expert."),
    "expert_prefetch": ("outcome", "Prefetched experts, by what became of them."),
    "expert_transfer_bytes": ("kind", "Bytes of expert weights read."),
    "errors": ("code", "Errors sent, by code."),
    "rejected": ("reason", "Messages refused before they became requests."),
    "connections": ("event", "Connections to the server's socket."),
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_latency_seconds": "Between two tokens of a request.",
    "e2e_request_latency_seconds": "From a request's arrival to its end.",
}


class HttpCounter:
    """Counts HTTP answers of this gateway by route and status; unknown paths share one label."""

    def __init__(self) -> None:
        self._answers: Counter[tuple[str, str]] = Counter()

    def count(self, route: str, status: int) -> None:
        """One answer."""
        self._answers[route, str(status)] += 1

    def metric(self) -> Metric:
        """The counts so far."""
        family = CounterMetricFamily(
            "outrider_gateway_http_responses",
            "HTTP answers of this gateway.",
            labels=["route", "status"],
        )
        for labels, count in sorted(self._answers.items()):
            family.add_metric(labels, float(count))
        return family


class _Snapshot(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def render(stats: Stats | None, http: HttpCounter) -> bytes:
    """The exposition of `stats` and of the gateway's own counts.

    Without an answer from the server (None) its metrics are left out, and `outrider_up` is 0:
    a counter that is absent for a while is no reset.
    """
    registry = CollectorRegistry()
    registry.register(_Snapshot([*_of_server(stats), http.metric()]))
    return generate_latest(registry)


def _of_server(stats: Stats | None) -> Iterator[Metric]:
    up = "1 if the server answers this gateway."
    yield GaugeMetricFamily("outrider_up", up, value=float(stats is not None))
    if stats is None:
        return
    ready = "1 if the server takes requests and makes progress."
    yield GaugeMetricFamily("outrider_ready", ready, value=float(stats.is_ready))
    for name, text in _GAUGES.items():
        yield GaugeMetricFamily(f"outrider_{name}", text, value=float(getattr(stats, name)))
    for name, text in _COUNTERS.items():
        value = getattr(stats, f"{name}_total")
        yield CounterMetricFamily(f"outrider_{name}", text, value=float(value))
    for name, (label, text) in _LABELLED.items():
        family = CounterMetricFamily(f"outrider_{name}", text, labels=[label])
        for value, count in sorted(getattr(stats, f"{name}_total").items()):
            family.add_metric([value], float(count))
        yield family
    for name, text in _HISTOGRAMS.items():
        yield _histogram(f"outrider_{name}", text, getattr(stats, name))


def _histogram(name: str, text: str, observed: Histogram) -> Metric:
    buckets = []
    total = 0
    bounds = [*(repr(bound) for bound in observed.bounds), "+Inf"]
    for bound, count in zip(bounds, observed.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=observed.sum)

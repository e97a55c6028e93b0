"""/metrics by Prometheus' own parser: names, labels, values, and nothing counted twice."""

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from scripted_client import make_stats
from served_gateway import run_gateway

from outrider.runtime.serving.conversation import ConnectionLost, ServerError
from outrider.runtime.serving.messages import Error

# INTERFACES section 4, with the labels it names.
PROMISED = {
    "outrider_requests_running": set(),
    "outrider_requests_waiting": set(),
    "outrider_requests_total": {"finish_reason"},
    "outrider_prompt_tokens_total": set(),
    "outrider_prompt_tokens_cached_total": set(),
    "outrider_generation_tokens_total": set(),
    "outrider_time_to_first_token_seconds_bucket": {"le"},
    "outrider_inter_token_latency_seconds_bucket": {"le"},
    "outrider_e2e_request_latency_seconds_bucket": {"le"},
    "outrider_expert_lookups_total": {"result"},
    "outrider_expert_prefetch_total": {"outcome"},
    "outrider_expert_transfer_bytes_total": {"kind"},
    "outrider_expert_stall_seconds_total": set(),
    "outrider_expert_cache_bytes": set(),
    "outrider_degraded": set(),
}


def scrape(gateway):
    reply = gateway.http.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(reply.text))
    samples = [sample for family in families for sample in family.samples]
    values = {(s.name, *sorted(s.labels.items())): s.value for s in samples}
    assert len(values) == len(samples), "a series is given twice"
    return families, values


def test_every_promised_metric_is_there_with_its_labels(gateway):
    families, _ = scrape(gateway)
    labels = {}
    for family in families:
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    assert {name: labels.get(name) for name in PROMISED} == PROMISED
    assert all(family.documentation for family in families)


def test_types_are_what_they_are_called(gateway):
    types = {family.name: family.type for family in scrape(gateway)[0]}
    assert types["outrider_requests"] == "counter"
    assert types["outrider_expert_stall_seconds"] == "counter"
    assert types["outrider_requests_running"] == "gauge"
    assert types["outrider_expert_cache_bytes"] == "gauge"
    assert types["outrider_inter_token_latency_seconds"] == "histogram"
    assert set(types.values()) == {"counter", "gauge", "histogram"}


def test_values_are_those_of_the_server(gateway):
    _, values = scrape(gateway)
    assert values["outrider_generation_tokens_total",] == 200
    assert values["outrider_requests_total", ("finish_reason", "stop")] == 3
    assert values["outrider_expert_lookups_total", ("result", "miss")] == 20
    assert values["outrider_expert_transfer_bytes_total", ("kind", "prefetch")] == 500
    assert values["outrider_expert_stall_seconds_total",] == 1.5
    assert values["outrider_up",] == 1 and values["outrider_degraded",] == 0


def test_histograms_are_cumulative(gateway):
    _, values = scrape(gateway)
    name = "outrider_time_to_first_token_seconds"
    buckets = [values[f"{name}_bucket", ("le", bound)] for bound in ("0.1", "1.0", "+Inf")]
    assert buckets == [3, 5, 6]
    assert values[f"{name}_count",] == 6 and values[f"{name}_sum",] == 2.5


def test_scraping_again_counts_nothing_again(gateway):
    _, first = scrape(gateway)
    _, second = scrape(gateway)
    changed = {name for name in first if first[name] != second.get(name)}
    assert all(name[0] == "outrider_gateway_http_responses_total" for name in changed)
    mine = (
        "outrider_gateway_http_responses_total", ("route", "/metrics"), ("status", "200")
    )  # fmt: skip
    assert second[mine] == first.get(mine, 0) + 1


def test_a_server_that_starts_anew_starts_its_counters_anew(gateway):
    assert scrape(gateway)[1]["outrider_generation_tokens_total",] == 200
    gateway.upstream.stats_answers = lambda count: make_stats(generation_tokens_total=3)
    assert scrape(gateway)[1]["outrider_generation_tokens_total",] == 3


def test_labels_are_escaped(gateway):
    stats = make_stats(errors_total={'a"b\\c\nd': 4})
    gateway.upstream.stats_answers = lambda count: stats
    assert scrape(gateway)[1]["outrider_errors_total", ("code", 'a"b\\c\nd')] == 4


def test_a_server_that_is_gone_is_told_and_no_counter_falls_to_zero(gateway):
    gateway.upstream.failure = ConnectionLost("nobody there")
    _, values = scrape(gateway)
    assert values["outrider_up",] == 0
    assert not any(name[0].startswith("outrider_generation") for name in values)


def test_unknown_paths_share_one_series(gateway):
    for number in range(5):
        gateway.http.get(f"/unknown/{number}")
    _, values = scrape(gateway)
    routes = {dict(name[1:])["route"] for name in values if name[0].startswith("outrider_gateway")}
    assert "other" in routes and not any("unknown" in route for route in routes)


def test_ready_follows_the_server(gateway):
    assert gateway.http.get("/ready").status_code == 200
    gateway.upstream.stats_answers = lambda count: make_stats(is_ready=False, state="draining")
    reply = gateway.http.get("/ready")
    assert reply.status_code == 503 and "draining" in reply.json()["error"]["message"]
    gateway.upstream.failure = ConnectionLost("nobody there")
    reply = gateway.http.get("/ready")
    assert reply.status_code == 503 and "nobody there" in reply.json()["error"]["message"]
    assert gateway.http.get("/health").status_code == 200


def test_the_pages_figures(gateway):
    figures = gateway.http.get("/stats").json()
    assert (figures["model"], figures["running"], figures["waiting"]) == ("nano", 2, 1)
    assert figures["lookups"] == {"hit": 70, "late": 10, "miss": 20}
    assert figures["transfer_bytes"] == 1500
    assert figures["residency"] == {"layers": 3, "experts": 8, "states": "0123" * 6}


def test_a_server_that_has_no_map_yet_is_shown_without(gateway):
    gateway.upstream.stats_answers = lambda count: make_stats(residency=b"")
    assert gateway.http.get("/stats").json()["residency"] is None


def test_many_who_ask_at_once_are_one_question():
    with run_gateway(max_age_s=3600.0) as gateway:
        for path in ("/stats", "/metrics", "/ready", "/stats"):
            assert gateway.http.get(path).status_code == 200
        assert gateway.upstream.num_stats == 1


def test_errors_of_stats_are_refusals(gateway):
    gateway.upstream.failure = ServerError(Error(code="engine_dead", message="it ended"))
    reply = gateway.http.get("/stats")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_dead")
    assert msgspec.json.decode(reply.content)

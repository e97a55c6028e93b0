"""More than the server takes: refused at once with a hint; deadlines; memory promised once."""

import time

from served_double import answer
from wire import CANCEL, CHUNK, DONE, ERROR

SERVER = {
    "max_running": 2,
    "max_kv_tokens": 1000,
    "options": {"max_waiting": 6, "max_per_client": 64},
}


def test_a_burst_above_the_limit_is_refused_at_once_and_the_others_end(wire):
    for number in range(30):
        wire.generate(b"%d" % number, f"burst {number}", 40)
    tokens = {b"%d" % number: b"" for number in range(30)}
    refused, done = {}, set()
    while len(refused) + len(done) < 30:
        kind, request_id, body = wire.receive()
        if kind == CHUNK:
            tokens[request_id] += bytes(body["token_ids"])
        elif kind == ERROR:
            refused[request_id] = body
        else:
            done.add(request_id)
    # Two run and six wait; whatever else was taken came after one of them had ended.
    assert len(done) >= 8 and len(refused) >= 10
    for error in refused.values():
        assert error["code"] == "overloaded"
        assert 100 <= error["retry_after_ms"] <= 30_000
        assert str(error["retry_after_ms"]) in error["message"]
    for request_id in done:
        assert tokens[request_id] == answer(f"burst {int(request_id)}", 40)


def test_a_deadline_that_passes_while_running_ends_the_request(wire):
    wire.generate(b"a", "slow run", 900, deadline_ms=600)
    began = time.monotonic()
    tokens, _, kind, body = wire.collect(b"a")
    assert (kind, body["code"]) == (ERROR, "deadline_exceeded")
    assert tokens and "600 ms" in body["message"]
    assert 0.5 < time.monotonic() - began < 20


def test_a_deadline_that_passes_while_waiting_ends_the_request(wire):
    for number in range(2):
        wire.generate(b"%d" % number, f"slow {number}", 400)
        assert wire.receive()[0] == CHUNK
    wire.generate(b"a", "waits", 4, deadline_ms=300)
    tokens, _, kind, body = wire.collect(b"a")
    assert (tokens, kind, body["code"]) == (b"", ERROR, "deadline_exceeded")
    for number in range(2):
        wire.send(CANCEL, b"%d" % number)


def test_a_deadline_that_does_not_pass_changes_nothing(wire):
    wire.generate(b"a", "in time", 20, deadline_ms=86_400_000)
    assert wire.collect(b"a")[:3:2] == (answer("in time", 20), DONE)


def test_kv_memory_that_can_never_fit_is_refused(wire):
    wire.generate(b"a", "p", 1000)
    _, _, kind, error = wire.collect(b"a")
    assert (kind, error["code"], error["field"]) == (ERROR, "invalid_request", "max_tokens")
    assert "1000 tokens in all" in error["message"]


def test_kv_memory_that_does_not_fit_now_is_waited_for(wire):
    wire.generate(b"first", "takes most", 900)
    assert wire.receive()[0] == CHUNK
    wire.generate(b"second", "waits", 500)
    for _ in range(50):
        kind, request_id, _ = wire.receive()
        assert (kind, request_id) == (CHUNK, b"first")
    stats = wire.stats()
    assert (stats["requests_running"], stats["requests_waiting"]) == (1, 1)
    assert stats["expert_cache_bytes"] == 910  # the double's: tokens promised
    wire.send(CANCEL, b"first")
    assert wire.collect(b"second")[:3:2] == (answer("waits", 500), DONE)


def test_a_failed_pass_fails_its_requests_and_no_others(server, wire):
    wire.generate(b"a", "fail", 5)
    _, _, kind, error = wire.collect(b"a")
    assert (kind, error["code"]) == (ERROR, "expert_unavailable")
    wire.generate(b"b", "goes on", 10)
    assert wire.collect(b"b")[:3:2] == (answer("goes on", 10), DONE)
    ended = [one for one in server.events("request ended") if one["code"] == "expert_unavailable"]
    assert ended and ended[-1]["level"] == "warning"


def test_a_request_that_the_engine_trips_over_costs_itself_only(server, wire):
    wire.generate(b"a", "bystander", 200)
    wire.generate(b"b", "trip", 5)
    _, _, kind, error = wire.collect(b"b")
    assert (kind, error["code"]) == (ERROR, "internal")
    assert "told to trip" not in error["message"]  # what went wrong is for the log
    assert wire.collect(b"a")[2] == DONE
    assert any("told to trip" in line.get("traceback", "") for line in server.logged())

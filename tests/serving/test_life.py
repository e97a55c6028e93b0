"""How a server begins and ends: signals, a dead or hanging engine, stale files, jumping clocks."""

import os
import signal
import stat
from pathlib import Path

import pytest
import served_double
import wire as by_hand
from served_double import answer
from wire import CHUNK, DONE, ERROR, GENERATE, PING, PONG, reconcile


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("s")


@pytest.fixture
def start(folder):
    started = []

    def start(**settings):
        started.append(served_double.start(folder, **settings))
        return started[-1]

    yield start
    for server in started:
        server.kill()


def test_sigterm_lets_open_requests_finish_and_takes_no_new_ones(start):
    server = start()
    with by_hand.wire(server.address) as one, by_hand.wire(server.address) as idle:
        assert idle.ask(PING)[0] == PONG
        one.generate(b"a", "to the end", 300)
        one.generate(b"b", "to the end too", 300)
        assert one.receive()[0] == CHUNK
        server.process.send_signal(signal.SIGTERM)
        for _ in range(100):
            kind, pong = idle.ask(PING)
            if pong["state"] == "draining":
                break
        assert not idle.stats()["is_ready"]
        idle.send(GENERATE, b"c", {"prompt": "late", "max_tokens": 1})
        kind, _, error = idle.receive()
        assert (kind, error["code"]) == (ERROR, "shutting_down")
        kinds = {}
        while len(kinds) < 2:
            kind, request_id, body = one.receive()
            if kind != CHUNK:
                kinds[request_id] = kind, body["usage"]["completion_tokens"]
        assert kinds == {b"a": (DONE, 300), b"b": (DONE, 300)}
    assert server.wait() == 0
    assert not Path(server.address.removeprefix("ipc://")).exists()
    assert [line["exit_code"] for line in server.events("stopped")] == [0]


def test_a_second_sigterm_ends_every_request_at_once(start):
    server = start()
    with by_hand.wire(server.address) as one:
        for number in range(6):
            one.generate(b"%d" % number, f"slow {number}", 4000)
        assert one.receive()[0] == CHUNK
        server.process.send_signal(signal.SIGTERM)
        for _ in range(200):
            if server.events("draining"):
                break
            one.socket.poll(20)
        server.process.send_signal(signal.SIGTERM)
        endings = {}
        while len(endings) < 6:
            kind, request_id, body = one.receive()
            if kind != CHUNK:
                assert request_id not in endings
                endings[request_id] = body["code"]
        assert set(endings.values()) == {"shutting_down"}
    assert server.wait() == 0


def test_draining_ends_after_its_time_limit(start):
    server = start(options={"shutdown_timeout_s": 0.5})
    with by_hand.wire(server.address) as one:
        one.generate(b"a", "slow", 4000)
        assert one.receive()[0] == CHUNK
        server.process.send_signal(signal.SIGTERM)
        _, _, kind, body = one.collect(b"a")
        assert (kind, body["code"]) == (ERROR, "shutting_down")
    assert server.wait() == 0


def test_after_sigkill_the_next_start_takes_the_address_over(start):
    first = start()
    path = Path(first.address.removeprefix("ipc://"))
    first.kill()
    assert path.is_socket()
    second = start()
    assert second.address == first.address
    with by_hand.wire(second.address) as one:
        one.generate(b"a", "again", 5)
        assert one.collect(b"a")[0] == answer("again", 5)


def test_an_address_that_is_served_is_not_stolen(start):
    first = start()
    second = start()
    assert second.address == "" and second.process.returncode != 0
    assert "another server holds this address" in second.log_file.read_text()
    with by_hand.wire(first.address) as one:
        one.generate(b"a", "still here", 5)
        assert one.collect(b"a")[0] == answer("still here", 5)


def test_a_tcp_address_that_is_taken_is_refused(start):
    first = start(address="tcp://127.0.0.1:0")
    second = start(address=first.address)
    assert second.address == "" and second.process.returncode != 0
    assert "Address already in use" in second.log_file.read_text()


def test_the_socket_lies_where_nobody_else_can_reach_it(start, folder):
    server = start(address=f"ipc://{folder}/new/s")
    path = Path(server.address.removeprefix("ipc://"))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.parent.stat().st_uid == os.geteuid()


def test_an_engine_that_dies_ends_everything_with_an_error(start):
    server = start()
    with by_hand.wire(server.address) as one:
        one.generate(b"a", "a bystander", 4000)
        assert one.receive()[0] == CHUNK
        one.generate(b"b", "die", 5)
        codes = {}
        while len(codes) < 2:
            kind, request_id, body = one.receive()
            if kind != CHUNK:
                codes[request_id] = body["code"]
        assert codes == {b"a": "engine_dead", b"b": "engine_dead"}
    assert server.wait() == 1
    assert server.events("engine dead")[0]["level"] == "critical"
    assert any("told to die" in line.get("traceback", "") for line in server.logged())


def test_an_engine_that_hangs_is_told_and_given_up(start):
    server = start(patience={"stalled_s": 0.5, "dead_s": 4.0})
    with by_hand.wire(server.address) as one, by_hand.wire(server.address) as asking:
        one.generate(b"a", "hang", 5)
        states = set()
        for _ in range(400):
            kind, pong = asking.ask(PING)
            states.add(pong["state"])
            if "stalled" in states:
                break
            asking.socket.poll(20)
        stats = asking.stats()  # answered though the engine says nothing
        assert "stalled" in states and not stats["is_ready"]
        _, _, kind, body = one.collect(b"a")
        assert (kind, body["code"]) == (ERROR, "engine_dead")
        assert "no progress" in body["message"]
    assert server.wait() == 1


def test_failing_passes_make_the_server_unready_until_one_succeeds(start):
    server = start()
    with by_hand.wire(server.address) as one:
        for number in range(3):
            one.generate(b"%d" % number, "fail", 2)
            assert one.collect(b"%d" % number)[2] == ERROR
        for _ in range(100):
            stats = one.stats()
            if stats["state"] == "failing":
                break
        assert stats["state"] == "failing" and not stats["is_ready"]
        one.generate(b"a", "works", 50)
        assert one.collect(b"a")[2] == DONE
        for _ in range(100):
            if one.stats()["is_ready"]:
                break
            one.socket.poll(100)
        assert one.stats()["is_ready"]


def test_a_clock_that_jumps_changes_no_latency_and_no_deadline(start):
    server = start(jumping_clock=True)
    with by_hand.wire(server.address) as one:
        for number in range(20):
            one.generate(b"a", f"jump {number}", 10, deadline_ms=600_000)
            assert one.collect(b"a")[:3:2] == (answer(f"jump {number}", 10), DONE)
        stats = one.settle()
    reconcile(stats)
    # A jump is a day; all of it together took seconds.
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
        histogram = stats[f"{name}_seconds"]
        assert 0 <= histogram["sum"] < 3600 and histogram["count"] > 0
    assert 0 < stats["uptime_seconds"] < 3600

"""Starting, stopping, waiting: signals, idle connections, a server that is gone, the command."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest
from scripted_client import Hold, chunk, done
from served_gateway import PATIENCE_S, eventually, run_gateway
from typer.testing import CliRunner

from outrider.runtime.cli import app
from outrider.runtime.serving.conversation import ConnectionLost
from outrider.runtime.serving.gateway import listener

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def test_a_server_that_is_gone_is_503_and_found_again(gateway):
    gateway.upstream.failure = ConnectionLost("no answer from ipc:///there")
    for method, path, body in (
        ("POST", "/v1/completions", {"prompt": "Hi"}),
        ("POST", "/v1/completions", {"prompt": "Hi", "stream": True}),
        ("GET", "/v1/models", None),
        ("GET", "/ready", None),
        ("GET", "/stats", None),
    ):
        reply = gateway.http.request(method, path, json=body)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (503, "server_unavailable")
        assert "ipc:///there" in error["message"] and reply.headers["retry-after"]
    gateway.upstream.failure = None
    assert gateway.http.post("/v1/completions", json={"prompt": "Hi"}).status_code == 200


def test_a_failure_nobody_thought_of_tells_the_client_nothing(gateway, caplog):
    gateway.upstream.failure = KeyError("a secret")
    reply = gateway.http.post("/v1/completions", json={"prompt": "Hi"})
    assert reply.status_code == 500 and "secret" not in reply.text
    assert reply.json()["error"]["code"] == "internal"
    assert "a secret" in caplog.text


def test_no_prompt_is_logged(gateway, caplog):
    with caplog.at_level("DEBUG", logger="outrider"):
        prompt = {"prompt": "my private words", "temperature": -1}
        gateway.http.post("/v1/completions", json=prompt)
        gateway.http.post("/v1/completions", json=prompt | {"temperature": 1})
    assert "private" not in caplog.text + str([record.__dict__ for record in caplog.records])
    fields = [record.fields for record in caplog.records if record.name == "outrider.gateway"]
    assert [(one["path"], one["status"]) for one in fields] == [
        ("/v1/completions", 400), ("/v1/completions", 200)
    ]  # fmt: skip


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(listener, "HEADER_TIMEOUT_S", 0.3)
    with run_gateway() as gateway:
        yield gateway


def is_closed(connection):
    """Whether the other end closes it, in time."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [b"", HEAD])
def test_a_connection_that_sends_no_request_is_closed(hasty, sent):
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=PATIENCE_S) as connection:
        connection.sendall(sent)
        assert is_closed(connection)
    assert hasty.http.get("/health").status_code == 200


@pytest.mark.parametrize("is_first", [True, False])
def test_a_header_that_comes_byte_by_byte_is_not_waited_for(hasty, is_first):
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=PATIENCE_S) as connection:
        if not is_first:
            connection.sendall(HEAD + b"\r\n")
            reply = b""
            while b'"ok"}' not in reply:
                reply += connection.recv(4096)
        gone = threading.Event()

        def dribble():
            try:
                while not gone.is_set():
                    connection.sendall(b"X")
                    time.sleep(0.01)
            except OSError:
                gone.set()

        thread = threading.Thread(target=dribble)
        thread.start()
        assert is_closed(connection)
        assert gone.wait(PATIENCE_S)
        thread.join()


def test_a_request_under_way_is_not_cut_for_taking_long(hasty):
    hold = Hold()
    hasty.upstream.script = lambda request: [chunk(0, "a"), hold, chunk(1, "b"), done(2)]
    body = {"prompt": "Hi", "stream": True}
    with hasty.http.stream("POST", "/v1/completions", json=body) as reply:
        assert hold.is_reached.wait(PATIENCE_S)
        time.sleep(3 * listener.HEADER_TIMEOUT_S)
        hold.is_released.set()
        assert list(reply.iter_lines())[-2] == "data: [DONE]"


def test_stopping_lets_open_streams_end():
    hold = Hold()
    with run_gateway() as gateway:
        gateway.upstream.script = lambda request: [chunk(0, "a"), hold, chunk(1, "b"), done(2)]
        body = {"prompt": "Hi", "stream": True}
        with gateway.http.stream("POST", "/v1/completions", json=body) as reply:
            assert hold.is_reached.wait(PATIENCE_S)
            gateway.stop()
            assert eventually(lambda: not accepts(gateway.port))
            hold.is_released.set()
            assert list(reply.iter_lines())[-2] == "data: [DONE]"
    assert gateway.upstream.is_closed and not gateway.upstream.was_cancelled.is_set()


def test_stopping_cancels_what_does_not_end_in_time():
    hold = Hold()
    with run_gateway(shutdown_timeout_s=1.0) as gateway:
        gateway.upstream.script = lambda request: [chunk(0, "a"), hold]
        body = {"prompt": "Hi", "stream": True}
        with gateway.http.stream("POST", "/v1/completions", json=body) as reply:
            assert hold.is_reached.wait(PATIENCE_S)
            gateway.stop()
            with pytest.raises(httpx2.RemoteProtocolError):
                list(reply.iter_lines())
    assert gateway.upstream.was_cancelled.is_set() and gateway.upstream.is_closed


def accepts(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S).close()
    except OSError:
        return False
    return True


def command(*options):
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from outrider.runtime.cli import main; main()",
            "gateway",
            *options,
        ],
        stderr=subprocess.PIPE,
        text=True,
    )


def refused(*options):
    result = CliRunner().invoke(app, ["gateway", *options])
    assert result.exit_code == 2
    return result.stderr


@pytest.mark.parametrize("http", ["0.0.0.0:0", "[::]:0", "192.168.1.1:0", "example.org:80"])
def test_the_command_refuses_other_addresses_without_keys(http):
    assert "--api-key-file" in refused("--http", http)


@pytest.mark.parametrize(
    "http", ["8000", ":8000", "localhost", "127.0.0.1:99999", "::1:80", "a b:1"]
)
def test_the_command_refuses_what_is_no_address(http):
    assert "HOST:PORT" in refused("--http", http)


def test_the_command_starts_without_its_server_and_stops_at_a_signal(tmp_path):
    address = f"ipc://{tmp_path}/none.sock"
    process = command("--connect", address, "--http", "127.0.0.1:0", "--timeout", "0.4")
    try:
        started = json.loads(process.stderr.readline())
        assert (started["event"], started["server"]) == ("listening", address)
        with httpx2.Client(base_url=started["url"], timeout=PATIENCE_S, trust_env=False) as http:
            assert http.get("/health").status_code == 200
            reply = http.get("/ready")
            assert reply.status_code == 503 and str(tmp_path) in reply.json()["error"]["message"]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 0
    lines = [json.loads(line) for line in errors.splitlines()]
    answered = {line["path"]: line["status"] for line in lines if line["event"] == "answered"}
    assert answered == {"/health": 200, "/ready": 503}


def test_a_second_signal_ends_the_command_at_once_and_shows_no_traceback(tmp_path):
    address = f"ipc://{tmp_path}/none.sock"
    process = command("--connect", address, "--http", "127.0.0.1:0", "--timeout", "600")
    try:
        url = json.loads(process.stderr.readline())["url"]
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as waiting:
            body = b'{"model": "nano", "prompt": "p"}'
            waiting.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            assert http_health(url)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert "Traceback" not in errors


def http_health(url):
    with httpx2.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as http:
        return http.get("/health").status_code == 200


def test_an_address_that_is_taken_is_told(gateway):
    process = command("--http", f"127.0.0.1:{gateway.port}")
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and str(gateway.port) in errors

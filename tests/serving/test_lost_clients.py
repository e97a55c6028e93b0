"""Clients that die, stop, or connect and say nothing: others notice nothing."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psutil
import served_double
import wire as by_hand
from served_double import answer
from wire import CANCEL, CHUNK, DONE, PING, PONG, reconcile

SERVER = {"link": {"heartbeat_s": 1, "heartbeat_timeout_s": 4}}


@contextmanager
def streaming(server, prompt, num_tokens) -> Iterator[subprocess.Popen[str]]:
    """Another process that takes a stream; it flows already."""
    command = [sys.executable, by_hand.__file__, server.address, prompt, str(num_tokens)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "flows\n"
        yield process
    finally:
        process.stdout.close()
        process.kill()
        process.wait(60)


def until_gone(wire, before) -> None:
    for _ in range(300):
        if wire.stats()["errors_total"]["client_gone"] > before:
            return
        wire.socket.poll(100)
    raise AssertionError("the server never noticed")


def cancelled(wire, request_id) -> bytes:
    """The tokens of a long stream that is cancelled now."""
    wire.send(CANCEL, request_id)
    tokens, _, kind, body = wire.collect(request_id)
    assert (kind, body["finish_reason"]) == (DONE, "cancelled")
    return tokens


def test_a_killed_client_is_noticed_and_its_request_ends(server, wire):
    with by_hand.wire(server.address) as watching, streaming(server, "killed", 8000) as client:
        before = watching.stats()["errors_total"]["client_gone"]
        wire.generate(b"a", "bystander", 8000)
        client.kill()
        began = time.monotonic()
        until_gone(watching, before)
        # A second is what is promised; the machine may be busy with other things.
        assert time.monotonic() - began < 10
        tokens = cancelled(wire, b"a")
        assert tokens == answer("bystander", 8000)[: len(tokens)]
    gone = server.events("client gone")[-1]
    assert gone["requests"] == 1 and gone["level"] == "warning"


def test_a_stopped_client_is_noticed_by_its_silence(server, wire):
    # Slow, so that the buffers between them never fill: only heartbeats can tell.
    with (
        by_hand.wire(server.address) as watching,
        streaming(server, "slow stopped", 8000) as client,
    ):
        before = watching.stats()["errors_total"]["client_gone"]
        client.send_signal(signal.SIGSTOP)
        wire.generate(b"a", "bystander", 8000)
        assert wire.receive()[0] == CHUNK
        until_gone(watching, before)
        tokens = cancelled(wire, b"a")
        assert tokens == answer("bystander", 8000)[1 : len(tokens) + 1]


def test_half_open_connections_are_closed_and_full_descriptors_refuse_cleanly(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s")
    server = served_double.start(
        folder, address="tcp://127.0.0.1:0", num_files=300, link={"handshake_s": 1.0}
    )
    try:
        host, port = "127.0.0.1", int(server.address.rpartition(":")[2])
        with by_hand.wire(server.address) as one, ExitStack() as stack:
            one.generate(b"a", "goes on", 600)
            assert one.receive()[0] == CHUNK
            for _ in range(1000):
                half = stack.enter_context(socket.socket())
                half.setblocking(False)
                half.connect_ex((host, port))
            tokens, _, kind, _ = one.collect(b"a")
            assert (tokens, kind) == (answer("goes on", 600)[1:], DONE)
            # All of them are closed or reset in time, and new clients are served.
            with by_hand.wire(server.address) as later:
                kind, _ = later.ask(PING)
                assert kind == PONG
                later.generate(b"b", "later", 5)
                assert later.collect(b"b")[0] == answer("later", 5)
            stats = one.settle()
        reconcile(stats)
        connections = stats["connections_total"]
        assert connections["accept_failed"] > 0
        assert connections["handshake_succeeded"] >= 2
        process = psutil.Process(server.process.pid)
        for _ in range(100):
            if process.num_fds() < 60:
                break
            time.sleep(0.1)
        assert process.num_fds() < 60
    finally:
        server.kill()


def test_clients_that_are_idle_take_no_place(server, wire):
    with ExitStack() as stack:
        for _ in range(64):
            idle = stack.enter_context(by_hand.wire(server.address))
            assert idle.ask(PING)[0] == PONG
        wire.generate(b"a", "busy", 100)
        assert wire.collect(b"a")[0] == answer("busy", 100)

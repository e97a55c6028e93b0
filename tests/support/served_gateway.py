"""A real uvicorn on loopback, in a thread of the test's process, in front of a scripted client."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2
from scripted_client import ScriptedClient

from outrider.runtime.serving.gateway.app import make_app
from outrider.runtime.serving.gateway.generation import Settings
from outrider.runtime.serving.gateway.keys import ApiKeys
from outrider.runtime.serving.gateway.listener import bind, http_server
from outrider.runtime.serving.gateway.upstream import Upstream

# Generous: machines are slow at times, and no test is about speed.
PATIENCE_S = 120.0


@dataclass
class Gateway:
    """A running gateway: its address, the client it stands on, and an HTTP client for it."""

    url: str
    port: int
    upstream: ScriptedClient
    http: httpx2.Client
    stop: Callable[[], None]


@contextmanager
def run_gateway(
    upstream: ScriptedClient | None = None,
    *,
    keys: ApiKeys | None = None,
    settings: Settings | None = None,
    shutdown_timeout_s: float = 30.0,
    max_age_s: float = 0.0,
) -> Iterator[Gateway]:
    """A gateway for as long as the block lasts; its end is orderly, or the test fails.

    By default it asks its server anew each time, so that no test waits for an answer to grow old.
    """
    upstream = upstream or ScriptedClient()
    server_side = Upstream(upstream, ready_max_age_s=max_age_s, stats_max_age_s=max_age_s)
    app = make_app(server_side, keys=keys, settings=settings)
    listening = bind("127.0.0.1", 0, write_timeout_s=30.0)
    is_started = threading.Event()
    server = http_server(app, shutdown_timeout_s=shutdown_timeout_s, on_started=is_started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    assert is_started.wait(PATIENCE_S)
    port = listening.getsockname()[1]
    url = f"http://127.0.0.1:{port}"

    def stop() -> None:
        server.should_exit = True

    try:
        with httpx2.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as http:
            yield Gateway(url, port, upstream, http, stop)
    finally:
        stop()
        thread.join(PATIENCE_S)
        listening.close()
    assert not thread.is_alive()


def eventually(is_so: Callable[[], bool]) -> bool:
    """Whether it becomes so, given time."""
    ends = time.monotonic() + PATIENCE_S
    while time.monotonic() < ends:
        if is_so():
            return True
        time.sleep(0.01)
    return False


def exchange(port: int, request: bytes) -> tuple[int, bytes]:
    """Send bytes as they are; the status and all that comes until the gateway closes."""
    reply = b""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        connection.sendall(request)
        # A gateway that closes with bytes unread resets the connection, after its answer.
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                reply += part
    return int(reply.split(b" ")[1]), reply

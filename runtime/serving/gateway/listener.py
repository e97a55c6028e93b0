"""The HTTP listener: uvicorn on one address, with time limits on connections and two-step shutdown.

Knows the ASGI application only as what it serves.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...errors import OutriderError

# A connection must have sent a request's header by then, its first one or its next.
HEADER_TIMEOUT_S = 15.0
KEEP_ALIVE_S = 30
MAX_HEADER_BYTES = 32 * 1024
MAX_CONNECTIONS = 1024


class ListenError(OutriderError):
    """The address cannot be listened on."""


class _TimedProtocol(H11Protocol):
    """uvicorn bounds how long a connection may idle after a request; this, how long before one."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_between_requests():
            # Not pushed back by each byte that dribbles in.
            if self._deadline is None:
                self._arm()
        elif self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        super().connection_lost(exc)

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, self._expire)

    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expire(self) -> None:
        self._deadline = None
        if self._is_between_requests() and not self.transport.is_closing():
            self.transport.abort()


class _Server(uvicorn.Server):
    """Ends open requests on the second signal, whichever it is."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            # The application is cut off where it stands, which uvicorn would log as its failure.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


def bind(host: str, port: int, *, write_timeout_s: float) -> socket.socket:
    """A listening socket; port 0 picks a free one. ListenError if the address is taken or not ours.

    The kernel itself drops a connection that takes nothing for `write_timeout_s`: closing one in
    an orderly way would wait for its reader.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = int(1000 * write_timeout_s)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ListenError(f"http: {host}:{port} cannot be listened on: {error}") from error
    return listening


def http_server(
    app: ASGIApp,
    *,
    shutdown_timeout_s: float = 30.0,
    on_started: Callable[[], None] = lambda: None,
) -> uvicorn.Server:
    """A server not started yet; its `run(sockets=[...])` blocks until `should_exit` is set."""
    config = uvicorn.Config(
        app,
        http=_TimedProtocol,
        ws="none",
        lifespan="on",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(shutdown_timeout_s)),
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
    return _Server(config, on_started)


def serve(
    app: ASGIApp,
    listening: socket.socket,
    *,
    shutdown_timeout_s: float,
    on_started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT. Blocks; main thread only.

    The first signal stops accepting and lets open requests end for `shutdown_timeout_s`, after
    which they are cancelled; the second ends at once.
    """
    server = http_server(app, shutdown_timeout_s=shutdown_timeout_s, on_started=on_started)
    # uvicorn raises the signal again once it has shut down: an orderly end is exit code 0.
    previous = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        server.run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, previous)
        listening.close()

"""ZeroMQ sockets with the options that this protocol needs; every one of them is a trap if left.

Defaults and what goes wrong with them: libzmq 4.3.5, zmq_setsockopt(3). Knows no messages.
"""

import logging
from dataclasses import dataclass
from typing import Any

import zmq

from ..errors import OutriderError
from .endpoint import Endpoint
from .keys import ClientKeys, ServerKeys
from .messages import LIMITS, MAX_REPLY_BYTES

logger = logging.getLogger(__name__)

ZAP_DOMAIN = b"outrider"
# Older ones have known holes: CVE-2019-6250, CVE-2019-13132, CVE-2020-15166.
_MIN_LIBZMQ = (4, 3, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """Times of a connection in seconds, and how many messages wait for a peer before EAGAIN."""

    heartbeat_s: float = 5.0
    heartbeat_timeout_s: float = 15.0
    handshake_s: float = 5.0
    linger_s: float = 2.0
    send_limit: int = 256
    receive_limit: int = 64


def check_library() -> None:
    """OutriderError for a libzmq with known holes."""
    if zmq.zmq_version_info() < _MIN_LIBZMQ:
        raise OutriderError(
            f"libzmq is {zmq.zmq_version()}: {'.'.join(map(str, _MIN_LIBZMQ))} or newer is needed"
        )


def server_socket(
    context: zmq.Context, options: LinkOptions, *, keys: ServerKeys | None = None
) -> zmq.Socket:
    """A ROUTER, not bound yet."""
    socket = context.socket(zmq.ROUTER)
    # Off, a message to a peer that has gone is dropped without a word.
    socket.set(zmq.ROUTER_MANDATORY, 1)
    _set_times(socket, options)
    socket.set(zmq.HANDSHAKE_IVL, _ms(options.handshake_s))
    socket.set(zmq.LINGER, _ms(options.linger_s))
    socket.set(zmq.SNDHWM, options.send_limit)
    socket.set(zmq.RCVHWM, options.receive_limit)
    socket.set(zmq.MAXMSGSIZE, int(LIMITS["message_bytes"].maximum))
    if keys is not None:
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_PUBLICKEY, keys.public)
        socket.set(zmq.CURVE_SECRETKEY, keys.secret)
        socket.set(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
    return socket


def client_socket(
    context: Any, endpoint: Endpoint, options: LinkOptions, *, keys: ClientKeys | None = None
) -> Any:
    """A DEALER that is connecting; made by a zmq or zmq.asyncio context."""
    socket = context.socket(zmq.DEALER)
    _set_times(socket, options)
    socket.set(zmq.LINGER, 0)
    # On, nothing queues up for a server that is not there.
    socket.set(zmq.IMMEDIATE, 1)
    socket.set(zmq.RECONNECT_IVL, 100)
    socket.set(zmq.RECONNECT_IVL_MAX, 5000)
    socket.set(zmq.MAXMSGSIZE, MAX_REPLY_BYTES)
    socket.set(zmq.IPV6, int(":" in endpoint.host))
    if keys is not None:
        socket.set(zmq.CURVE_PUBLICKEY, keys.public)
        socket.set(zmq.CURVE_SECRETKEY, keys.secret)
        socket.set(zmq.CURVE_SERVERKEY, keys.server)
    socket.connect(endpoint.address)
    return socket


def _set_times(socket: Any, options: LinkOptions) -> None:
    socket.set(zmq.HEARTBEAT_IVL, _ms(options.heartbeat_s))
    socket.set(zmq.HEARTBEAT_TIMEOUT, _ms(options.heartbeat_timeout_s))
    socket.set(zmq.HEARTBEAT_TTL, _ms(options.heartbeat_timeout_s))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)

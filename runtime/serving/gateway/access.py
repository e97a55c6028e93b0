"""Who is let in: the check that stands before every route, and what a body may be.

Deny by default: a path needs a key unless it is listed as open, whether the path exists or not.
"""

import asyncio
import ipaddress

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ...errors import UsageError
from .keys import ApiKeys
from .refusal import Refusal

OPEN_PATHS = frozenset({"/health"})
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only; names other than localhost are not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(host: str, *, has_keys: bool) -> None:
    """UsageError for an address that others can reach while no key is asked for."""
    if not has_keys and not is_loopback(host):
        raise UsageError(
            f"http: {host!r} can be reached from other machines, and no key is asked for: "
            "give --api-key-file, or listen on 127.0.0.1"
        )


class Access:
    """ASGI middleware. With keys, a request shows one; without, it comes from this machine's names.

    The second check is against other sites' pages whose name was pointed at 127.0.0.1: a browser
    sends their name as Host.
    """

    def __init__(self, app: ASGIApp, *, keys: ApiKeys | None) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                self._check(Headers(scope=scope))
            except Refusal as refusal:
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        if self._keys is None:
            host = headers.get("host", "")
            if _name_of(host) not in _LOCAL_NAMES:
                raise Refusal(
                    403,
                    f"Host is {host[:100]!r}: without API keys only localhost, 127.0.0.1 and [::1] "
                    "are served; start the gateway with --api-key-file to be reached otherwise",
                    code="host_not_allowed",
                )
        elif not self._keys.admits(headers.get("authorization")):
            raise Refusal(
                401,
                "no valid API key: send one as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": 'Basic realm="outrider", charset="UTF-8"'},
            )


def _name_of(host: str) -> str:
    # "[::1]:8000" -> "::1", "localhost:8000" -> "localhost"
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The whole JSON body; refused by its declared length before a byte of it is read.

    Raises Refusal: 415 if it is not declared as JSON (so that no form of another site's page can
    send it), 413 over `max_bytes`, 408 after `timeout_s`; ClientDisconnect if the client leaves.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refusal(
            415,
            f"content-type is {media_type[:60]!r}: accepted is application/json",
            code="unsupported_media_type",
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > max_bytes):
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                num_bytes += len(part)
                if num_bytes > max_bytes:
                    raise _too_large(max_bytes)
                parts.append(part)
    except TimeoutError:
        raise Refusal(
            408,
            f"the body did not arrive within {timeout_s:g} s",
            code="body_timeout",
            headers={"connection": "close"},
        ) from None
    return b"".join(parts)


def _too_large(max_bytes: int) -> Refusal:
    # What is left of the body is not read, so the connection cannot go on.
    return Refusal(
        413,
        f"the body is larger than {max_bytes} bytes",
        code="body_too_large",
        headers={"connection": "close"},
    )

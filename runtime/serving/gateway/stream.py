"""Replies that end when their reader does: an event stream, and a wait cut short by a disconnect.

Works on plain ASGI messages, since a generation must be cancelled the moment nobody waits for it.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from .refusal import Refusal

T = TypeVar("T")

# Without a word for this long, proxies between here and the client would cut the connection.
KEEP_ALIVE_S = 10.0
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    # nginx would otherwise collect events before it passes them on.
    (b"x-accel-buffering", b"no"),
]


class ClientGone(Exception):
    """The client left before its reply was complete; nobody is there to be told."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled, and ClientGone raised, if the client leaves first.

    The request's body must have been read whole.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def event(document: object) -> bytes:
    """One server-sent event that carries a JSON document."""
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


END = b"data: [DONE]\n\n"


class EventStream:
    """An ASGI response that sends `events`, closing that generator however the reply ends.

    A Refusal raised before the first event becomes a plain response with its status, one raised
    later an event of the same shape, after which the stream ends without [DONE]. A reader that
    takes nothing for `write_timeout_s` counts as gone, and nothing is sent to one that is.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        write_timeout_s: float,
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        self.status_code = 200
        self._events = events
        self._write_timeout_s = write_timeout_s
        self._keep_alive_s = keep_alive_s
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            try:
                await while_connected(receive, self._send_all(send))
            except ClientGone:
                return
            except Refusal as refusal:
                if not self._is_started:
                    await refusal.response()(scope, receive, send)
                    return
                await self._send(send, event(refusal.document))
                await self._send(send, b"", is_last=True)

    async def _send_all(self, send: Send) -> None:
        while True:
            part = await self._next(send)
            if part is None:
                await self._send(send, b"", is_last=True)
                return
            await self._send(send, part)

    async def _next(self, send: Send) -> bytes | None:
        """The next event, None at the end; comments go out while it lets itself be waited for."""
        pending = asyncio.ensure_future(anext(self._events, None))
        try:
            while not (await asyncio.wait((pending,), timeout=self._keep_alive_s))[0]:
                await self._send(send, b": waiting\n\n")
            return pending.result()
        finally:
            if not pending.done():
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)

    async def _send(self, send: Send, body: bytes, *, is_last: bool = False) -> None:
        if not self._is_started:
            self._is_started = True
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        message = {"type": "http.response.body", "body": body, "more_body": not is_last}
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await send(message)
        except TimeoutError:
            raise ClientGone from None

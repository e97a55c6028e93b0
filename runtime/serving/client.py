"""Clients in Python: one that blocks, one for asyncio. Leaving a stream cancels its request."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any, Self, TypeVar

import zmq
import zmq.asyncio

from ..request import GenerationRequest
from .conversation import (
    DEFAULT_CREDIT,
    NUM_SILENT_POLLS,
    ConnectionLost,
    Conversation,
    RequestIds,
    ServerError,
    checked_frames,
)
from .endpoint import default_address, parse
from .keys import client_keys
from .messages import (
    Cancel,
    Chunk,
    Credit,
    Done,
    Error,
    Generate,
    GetStats,
    Hello,
    Message,
    Ping,
    Pong,
    Ready,
    ServerMessage,
    Stats,
    decode_server,
)
from .transport import LinkOptions, client_socket

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer", Ready, Stats, Pong)


class Client:
    """A connection to a server. One thread; calls block, for `timeout_s` of silence at most.

    `address` None is this user's own server. `keys` is a folder with the client's keys, for a
    server that asks for them. Streams of one client may be taken in turns. The connection is made
    again by itself when it breaks; requests that were open are lost with it (ConnectionLost).
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout_s: float = 30.0,
        credit: int = DEFAULT_CREDIT,
        keys: Path | None = None,
        options: LinkOptions | None = None,
        name: str = "outrider",
    ) -> None:
        endpoint = parse(address or default_address())
        self.address = endpoint.address
        self._timeout_s = timeout_s
        self._credit = credit
        self._name = name
        self._ids = RequestIds()
        self._inboxes: dict[bytes, deque[ServerMessage]] = {}
        pair = None if keys is None else client_keys(keys)
        self._context = zmq.Context()
        self._socket = client_socket(self._context, endpoint, options or LinkOptions(), keys=pair)

    def ready(self) -> Ready:
        """Say hello: what is served, under which limits. Raises ConnectionLost."""
        return self._ask(Hello(client=self._name), Ready)

    def ping(self) -> Pong:
        """Whether the server answers, and its state. Raises ConnectionLost."""
        return self._ask(Ping(), Pong)

    def stats(self) -> Stats:
        """Everything that the server has counted. Raises ConnectionLost."""
        return self._ask(GetStats(), Stats)

    def generate(self, request: GenerationRequest) -> Generator[Chunk | Done, None, None]:
        """Send a request; yields its chunks as they come and DONE as the last item.

        Closing the generator, as leaving a loop over it does, cancels what is left. Raises
        ServerError, ConnectionLost; UsageError for a request too large to be sent.
        """
        frames = checked_frames(Generate.of(request, credit=self._credit), b"")
        return self._stream(frames)

    def close(self) -> None:
        """Cut the connection; the server ends what was open. Idempotent."""
        self._socket.close(linger=0)
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(self, frames: list[bytes]) -> Generator[Chunk | Done, None, None]:
        request_id = self._ids.new()
        conversation = Conversation(self.address, credit=self._credit)
        self._inboxes[request_id] = deque()
        try:
            self._send_frames([frames[0], request_id, frames[2]])
            while not conversation.has_ended:
                item = conversation.accept(self._await(request_id, Ping()))
                if item is None:
                    continue
                yield item
                if isinstance(item, Chunk) and (granted := conversation.taken()):
                    self._send(Credit(chunks=granted), request_id)
        finally:
            del self._inboxes[request_id]
            if not conversation.has_ended:
                self._try_send(Cancel(), request_id)

    def _ask(self, question: Message, kind: type[Answer]) -> Answer:
        request_id = self._ids.new()
        self._inboxes[request_id] = deque()
        try:
            self._send(question, request_id)
            while True:
                answer = self._await(request_id, question)
                if isinstance(answer, kind):
                    return answer
                if isinstance(answer, Error):
                    raise ServerError(answer)
        finally:
            del self._inboxes[request_id]

    def _await(self, request_id: bytes, when_silent: Message) -> ServerMessage:
        """The next message with this id; `when_silent` is sent at each part of the time-out."""
        for _ in range(NUM_SILENT_POLLS):
            reply = self._receive(request_id)
            if reply is not None:
                return reply
            self._try_send(when_silent, request_id)
        raise ConnectionLost.silent(self.address, self._timeout_s)

    def _receive(self, request_id: bytes) -> ServerMessage | None:
        inbox = self._inboxes[request_id]
        while not inbox:
            if not self._socket.poll(self._poll_ms, zmq.POLLIN):
                return None
            sender, message = decode_server(self._socket.recv_multipart())
            # What belongs to a stream that was left is dropped.
            if sender in self._inboxes:
                self._inboxes[sender].append(message)
        return inbox.popleft()

    @property
    def _poll_ms(self) -> int:
        return max(1, round(1000 * self._timeout_s / NUM_SILENT_POLLS))

    def _send(self, message: Message, request_id: bytes) -> None:
        self._send_frames(checked_frames(message, request_id))

    def _send_frames(self, frames: list[bytes]) -> None:
        for _ in range(NUM_SILENT_POLLS):
            if self._socket.poll(self._poll_ms, zmq.POLLOUT):
                self._socket.send_multipart(frames)
                return
        raise ConnectionLost.silent(self.address, self._timeout_s)

    def _try_send(self, message: Message, request_id: bytes) -> None:
        if not self._socket.closed and self._socket.poll(0, zmq.POLLOUT):
            self._socket.send_multipart(checked_frames(message, request_id))


class AsyncClient:
    """As `Client`, for one asyncio loop; any number of tasks may use it at the same time."""

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout_s: float = 30.0,
        credit: int = DEFAULT_CREDIT,
        keys: Path | None = None,
        options: LinkOptions | None = None,
        name: str = "outrider",
    ) -> None:
        self._endpoint = parse(address or default_address())
        self.address = self._endpoint.address
        self._timeout_s = timeout_s
        self._credit = credit
        self._name = name
        self._keys = None if keys is None else client_keys(keys)
        self._options = options or LinkOptions()
        self._ids = RequestIds()
        self._inboxes: dict[bytes, asyncio.Queue[ServerMessage | Exception]] = {}
        self._context: zmq.asyncio.Context | None = None
        self._socket: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._sending: set[asyncio.Task[None]] = set()

    async def ready(self) -> Ready:
        """Say hello: what is served, under which limits. Raises ConnectionLost."""
        return await self._ask(Hello(client=self._name), Ready)

    async def ping(self) -> Pong:
        """Whether the server answers, and its state. Raises ConnectionLost."""
        return await self._ask(Ping(), Pong)

    async def stats(self) -> Stats:
        """Everything that the server has counted. Raises ConnectionLost."""
        return await self._ask(GetStats(), Stats)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk | Done, None]:
        """Send a request; yields its chunks as they come and DONE as the last item.

        Closing the generator cancels what is left (use contextlib.aclosing around a loop that may
        be left early). Raises as `Client.generate`, at the first item.
        """
        frames = checked_frames(Generate.of(request, credit=self._credit), b"")
        request_id = self._ids.new()
        conversation = Conversation(self.address, credit=self._credit)
        inbox = self._inboxes[request_id] = asyncio.Queue()
        try:
            await self._send_frames([frames[0], request_id, frames[2]])
            while not conversation.has_ended:
                item = conversation.accept(await self._await(inbox, request_id, Ping()))
                if item is None:
                    continue
                yield item
                if isinstance(item, Chunk) and (granted := conversation.taken()):
                    await self._send(Credit(chunks=granted), request_id)
        finally:
            del self._inboxes[request_id]
            if not conversation.has_ended:
                self._try_send(Cancel(), request_id)

    async def close(self) -> None:
        """Cut the connection; the server ends what was open. Idempotent."""
        tasks = [*self._sending, *([] if self._reader is None else [self._reader])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._reader = None
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None
        if self._context is not None:
            self._context.term()
            self._context = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _ask(self, question: Message, kind: type[Answer]) -> Answer:
        request_id = self._ids.new()
        inbox = self._inboxes[request_id] = asyncio.Queue()
        try:
            await self._send(question, request_id)
            while True:
                answer = await self._await(inbox, request_id, question)
                if isinstance(answer, kind):
                    return answer
                if isinstance(answer, Error):
                    raise ServerError(answer)
        finally:
            del self._inboxes[request_id]

    async def _await(
        self,
        inbox: "asyncio.Queue[ServerMessage | Exception]",
        request_id: bytes,
        when_silent: Message,
    ) -> ServerMessage:
        for _ in range(NUM_SILENT_POLLS):
            try:
                async with asyncio.timeout(self._timeout_s / NUM_SILENT_POLLS):
                    reply = await inbox.get()
            except TimeoutError:
                self._try_send(when_silent, request_id)
                continue
            if isinstance(reply, Exception):
                raise reply
            return reply
        raise ConnectionLost.silent(self.address, self._timeout_s)

    def _connected(self) -> Any:
        if self._socket is None:
            self._context = zmq.asyncio.Context()
            self._socket = client_socket(
                self._context, self._endpoint, self._options, keys=self._keys
            )
            self._reader = asyncio.get_running_loop().create_task(self._read(self._socket))
        return self._socket

    async def _read(self, socket: Any) -> None:
        while True:
            frames = await socket.recv_multipart()
            try:
                sender, message = decode_server(frames)
            except Exception as error:  # an answer that is none concerns everybody who waits
                for inbox in self._inboxes.values():
                    inbox.put_nowait(error)
                continue
            # What belongs to a stream that was left is dropped.
            if sender in self._inboxes:
                self._inboxes[sender].put_nowait(message)

    async def _send(self, message: Message, request_id: bytes) -> None:
        await self._send_frames(checked_frames(message, request_id))

    async def _send_frames(self, frames: list[bytes]) -> None:
        socket = self._connected()
        part_ms = max(1, round(1000 * self._timeout_s / NUM_SILENT_POLLS))
        for _ in range(NUM_SILENT_POLLS):
            if await socket.poll(part_ms, zmq.POLLOUT):
                await socket.send_multipart(frames)
                return
        raise ConnectionLost.silent(self.address, self._timeout_s)

    def _try_send(self, message: Message, request_id: bytes) -> None:
        # In a task of its own: a generator that is being closed should not wait for a socket.
        if self._socket is not None:
            frames = checked_frames(message, request_id)
            task = asyncio.get_running_loop().create_task(self._send_frames(frames))
            self._sending.add(task)
            task.add_done_callback(self._sent)

    def _sent(self, task: "asyncio.Task[None]") -> None:
        self._sending.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.debug("not sent to %s: %s", self.address, task.exception())

"""What is done with every message of a client and every event of the engine. No loop, no time-outs.

Joins the open requests, the socket and the engine's thread; runs on the socket's thread.
"""

import logging
import time

from ..limits import LIMITS as REQUEST_LIMITS
from .backend import Backend
from .clock import AwakeClock
from .driver import Driver
from .health import Health
from .log import event
from .messages import (
    LIMITS,
    PROTOCOL_VERSION,
    Cancel,
    Credit,
    Error,
    Generate,
    GetStats,
    Hello,
    Limits,
    Message,
    Ping,
    Pong,
    ProtocolError,
    Ready,
    decode_client,
    encode,
)
from .metrics import Counters, Snapshot
from .registry import Registry, RequestLimits
from .router import Router
from .work import Ending, Event, Key

logger = logging.getLogger(__name__)

_MAX_ASKED = 256


class Exchange:
    """Every open request gets exactly one last message, or its client has gone."""

    def __init__(
        self,
        backend: Backend,
        driver: Driver,
        router: Router,
        *,
        limits: RequestLimits,
        counters: Counters,
        health: Health,
        clock: AwakeClock,
        instance: str,
        version: str,
        logs_prompts: bool,
    ) -> None:
        self.registry = Registry(limits)
        self._backend = backend
        self._driver = driver
        self._router = router
        self._limits = limits
        self._counters = counters
        self._health = health
        self._clock = clock
        self._instance = instance
        self._version = version
        self._logs_prompts = logs_prompts
        self._began_s = time.monotonic()
        self._stats_wanted: list[tuple[bytes, bytes, float]] = []

    def deliver(self, posted: Event) -> None:
        """Send what the engine posted, and close a request with its last message."""
        if self.registry.find(posted.key.client, posted.key.request_id) != posted.key:
            return  # it was given its last message when the server gave up waiting
        if posted.outcome is not None:
            self._close(posted)
        if posted.message is not None:
            frames = encode(posted.message, posted.key.request_id)
            is_last = posted.outcome is not None
            sent = self._router.send(posted.key.client, frames, is_last=is_last)
            if sent == "gone":
                self.forget(posted.key.client)
            elif sent == "dropped":
                self.cut(posted.key.client)

    def _close(self, posted: Event) -> None:
        assert posted.outcome is not None
        self.registry.close(posted.key, duration_s=posted.summary.get("e2e_s"))
        self._counters.finished[posted.outcome] += 1
        code = posted.message.code if isinstance(posted.message, Error) else None
        if code is not None:
            self._counters.errors[code] += 1
        event(
            logger,
            logging.INFO if code is None else logging.WARNING,
            "request ended",
            client=posted.key.client,
            request=posted.key.request_id,
            outcome=posted.outcome,
            code=code,
            **posted.summary,
        )

    def handle(self, client: bytes, frames: list[bytes], num_frames: int) -> None:
        """Do what a client's message asks, whatever it is."""
        try:
            if num_frames != len(frames):
                frames = [b""] * num_frames
            request_id, message = decode_client(frames)
        except ProtocolError as error:
            self._counters.rejected[error.error.code] += 1
            event(
                logger, logging.WARNING, "message refused",
                client=client, code=error.error.code, reason=error.error.message,
            )  # fmt: skip
            self._answer(client, error.request_id, error.error)
            return
        match message:
            case Generate():
                self._generate(client, request_id, message)
            case Credit():
                key = self.registry.find(client, request_id)
                if key is not None:
                    self._driver.grant(key, message.chunks)
            case Cancel():
                key = self.registry.find(client, request_id)
                if key is not None:
                    self._driver.end(key, Ending())
                else:
                    self._answer(client, request_id, self._pong(client, request_id))
            case Ping():
                self._answer(client, request_id, self._pong(client, request_id))
            case GetStats():
                self._stats_wanted.append((client, request_id, self._clock.now_s))
                del self._stats_wanted[:-_MAX_ASKED]
                self._driver.ask_snapshot()
            case Hello():
                event(logger, logging.INFO, "hello", client=client, name=message.client)
                self._answer(client, request_id, self._ready())

    def _generate(self, client: bytes, request_id: bytes, request: Generate) -> None:
        if self._health.is_draining or self._health.is_dead:
            key: Key | Error = Error(
                code="shutting_down", message="the server is shutting down; ask another one"
            )
        else:
            key = self.registry.open(client, request_id)
        if isinstance(key, Error):
            self._counters.rejected[key.code] += 1
            event(
                logger, logging.WARNING, "request refused",
                client=client, request=request_id, code=key.code,
            )  # fmt: skip
            self._answer(client, request_id, key)
            return
        self._counters.started += 1
        prompt = {"prompt": request.prompt} if self._logs_prompts else {}
        event(
            logger, logging.DEBUG, "request opened",
            client=client, request=request_id, max_tokens=request.max_tokens, **prompt,
        )  # fmt: skip
        self._driver.submit(key, request)

    def _answer(self, client: bytes, request_id: bytes, message: Message) -> None:
        if self._router.answer(client, encode(message, request_id)) == "gone":
            self.forget(client)

    def _pong(self, client: bytes, request_id: bytes) -> Pong:
        is_open = self.registry.find(client, request_id) is not None
        return Pong(instance=self._instance, is_open=is_open, state=self._health.state)

    def _ready(self) -> Ready:
        state = self._health.state
        return Ready(
            protocol=PROTOCOL_VERSION,
            server=self._version,
            instance=self._instance,
            is_ready=state == "ready",
            state=state,
            model=self._backend.model,
            limits=Limits(
                message_bytes=int(LIMITS["message_bytes"].maximum),
                request_id_bytes=int(LIMITS["request_id_bytes"].maximum),
                credit=int(LIMITS["credit"].maximum),
                prompt_chars=int(REQUEST_LIMITS["prompt_chars"].maximum),
                context_tokens=self._backend.model.context_tokens,
                requests_running=self._limits.max_running,
                requests_waiting=self._limits.max_waiting,
                requests_per_client=self._limits.max_per_client,
            ),
        )

    def answer_stats(self, snapshot: Snapshot, *, older_than_s: float = 0.0) -> None:
        """Answer who has waited for a count for so long."""
        due = [one for one in self._stats_wanted if self._clock.now_s - one[2] >= older_than_s]
        if not due:
            return
        self._stats_wanted = [one for one in self._stats_wanted if one not in due]
        stats = self._counters.stats(
            snapshot,
            num_open=len(self.registry),
            state=self._health.state,
            model=self._backend.model,
            instance=self._instance,
            uptime_s=time.monotonic() - self._began_s,
        )
        for client, request_id, _ in due:
            self._answer(client, request_id, stats)

    def forget(self, client: bytes) -> None:
        """A client has gone: its requests end, and nobody is told."""
        keys = self.registry.of(client)
        for key in keys:
            self._driver.end(key, Ending(is_silent=True))
        if keys:
            self._counters.errors["client_gone"] += len(keys)
            event(logger, logging.WARNING, "client gone", client=client, requests=len(keys))

    def cut(self, client: bytes) -> None:
        """A client takes nothing: its requests end with an error, which is kept for it a while."""
        if not self._router.cut(client):
            return
        error = Error(
            code="slow_consumer",
            message="messages were not read for too long; grant credit for what is read only",
        )
        event(logger, logging.WARNING, "client too slow", client=client)
        for key in self.registry.of(client):
            self._driver.end(key, Ending(error))

    def probe(self) -> None:
        """Find out which clients have gone: only a message to each can tell."""
        for client in self.registry.clients():
            self._answer(client, b"", self._pong(client, b""))

    def end_all(self, error: Error) -> None:
        """Send every open request its last message from here: the engine may never do it."""
        for key in self.registry.every():
            self._driver.end(key, Ending(error, is_silent=True))
            self.deliver(Event(key, error, "error"))

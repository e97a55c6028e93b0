"""The gateway's client of the server, shared by all HTTP requests; what fails there is a refusal.

Knows requests and messages, no HTTP body. The client connects again by itself.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Generic, Protocol, TypeVar

from ...errors import UsageError
from ...request import GenerationRequest
from ..conversation import ConnectionLost, ServerError
from ..messages import Chunk, Done, ProtocolError, Ready, Stats
from .refusal import Refusal

T = TypeVar("T")

# Answers this old are given again: figures that many pages and scrapes ask for at once.
STATS_MAX_AGE_S = 0.5
READY_MAX_AGE_S = 5.0

# How each of the server's errors is told over HTTP. Those that the same request would meet again
# are final: OpenAI's client tries 5xx once more by itself.
_STATUS: dict[str, tuple[int, bool]] = {
    "deadline_exceeded": (504, True),
    "duplicate_id": (500, False),
    "engine_dead": (503, False),
    "expert_unavailable": (500, False),
    "internal": (500, False),
    "invalid_request": (400, True),
    "overloaded": (429, False),
    "shutting_down": (503, False),
    "slow_consumer": (408, True),
    "unsupported_version": (502, True),
}
_FIELDS = {"prompt_token_ids": "prompt"}


class EngineClient(Protocol):
    """What the gateway needs of a client; `AsyncClient` is one, with the same errors."""

    async def ready(self) -> Ready: ...
    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk | Done, None]: ...
    async def stats(self) -> Stats: ...
    async def close(self) -> None: ...


class Upstream:
    """One server as the endpoints see it. Every method raises Refusal and nothing else."""

    def __init__(
        self,
        client: EngineClient,
        *,
        ready_max_age_s: float = READY_MAX_AGE_S,
        stats_max_age_s: float = STATS_MAX_AGE_S,
    ) -> None:
        self.since = int(time.time())
        self._client = client
        self._ready = _Remembered(client.ready, max_age_s=ready_max_age_s)
        self._stats = _Remembered(client.stats, max_age_s=stats_max_age_s)

    async def ready(self) -> Ready:
        """What is served; at most `ready_max_age_s` old."""
        return await self._ready.get()

    async def stats(self) -> Stats:
        """What the server has counted; at most `stats_max_age_s` old."""
        return await self._stats.get()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk | Done, None]:
        """Chunks, then DONE. Closing the generator cancels the request."""
        items = self._client.generate(request)
        async with aclosing(items):
            while True:
                item = await _refusing(anext(items, None))
                if item is None:
                    return
                yield item

    async def close(self) -> None:
        """Cut the connection; the server ends what was open."""
        await self._client.close()


class _Remembered(Generic[T]):
    """An answer kept for `max_age_s`; while one is being fetched, all who ask wait for that one.

    They share its failure too, which is not kept: a server that is gone costs one time-out, not
    one after the other.
    """

    def __init__(self, fetch: Callable[[], Awaitable[T]], *, max_age_s: float) -> None:
        self._fetch = fetch
        self._max_age_s = max_age_s
        self._kept: tuple[float, T] | None = None
        self._pending: asyncio.Task[T] | None = None

    async def get(self) -> T:
        """The answer, fetched if there is none young enough."""
        if self._kept is not None and time.monotonic() - self._kept[0] < self._max_age_s:
            return self._kept[1]
        if self._pending is None:
            self._pending = asyncio.ensure_future(self._refresh())
            self._pending.add_done_callback(self._settle)
        # One that stops waiting does not take the answer from the others.
        return await asyncio.shield(self._pending)

    async def _refresh(self) -> T:
        answer = await _refusing(self._fetch())
        self._kept = (time.monotonic(), answer)
        return answer

    def _settle(self, task: "asyncio.Task[T]") -> None:
        self._pending = None
        if not task.cancelled():
            # Looked at, so that nobody waiting any more is nothing to be warned of.
            task.exception()


async def _refusing(answer: Awaitable[T]) -> T:
    try:
        return await answer
    except ServerError as error:
        raise _refusal(error) from None
    except ConnectionLost as error:
        raise Refusal(
            503, f"no server: {error}", code="server_unavailable", retry_after_s=1
        ) from None
    except ProtocolError as error:
        message = f"the server's answer cannot be read: {error}"
        raise Refusal(502, message, code="bad_answer", is_final=True) from None
    except UsageError as error:
        raise Refusal.of(error) from None


def _refusal(error: ServerError) -> Refusal:
    status, is_final = _STATUS[error.code]
    retry_after_s = None if error.retry_after_ms is None else error.retry_after_ms / 1000
    if error.code == "shutting_down" and retry_after_s is None:
        retry_after_s = 1.0
    field = None if error.field is None else _FIELDS.get(error.field, error.field)
    return Refusal(
        status,
        str(error).removeprefix(f"{error.code}: "),
        code=error.code,
        param=field,
        retry_after_s=retry_after_s,
        is_final=is_final,
    )

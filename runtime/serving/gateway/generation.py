"""POST /v1/completions and /v1/chat/completions: a body in, an answer or a stream of events out."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from ..messages import Chunk, Done, TokenLogprob
from .access import read_body
from .bodies import Asked, parse_chat, parse_completion
from .refusal import JsonResponse, Refusal
from .replies import ChatReply, CompletionReply, Reply, usage_of
from .stream import END, EventStream, event, while_connected
from .upstream import Upstream


@dataclass(frozen=True, slots=True)
class Settings:
    """What bounds a request over HTTP; the server's own limits come on top."""

    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 30.0
    write_timeout_s: float = 60.0


class Answer(Protocol):
    """What an endpoint gives back: it is sent by being called."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class GenerationEndpoints:
    """Both endpoints; they differ in their bodies and in the shape of their replies only."""

    def __init__(self, upstream: Upstream, settings: Settings) -> None:
        self._upstream = upstream
        self._settings = settings

    async def completions(self, request: Request) -> Answer:
        """POST /v1/completions. Raises Refusal; ClientGone if nobody waits any more."""
        return await self._answer(request, parse_completion, CompletionReply)

    async def chat(self, request: Request) -> Answer:
        """POST /v1/chat/completions. Raises Refusal; ClientGone if nobody waits any more."""
        return await self._answer(request, parse_chat, ChatReply)

    async def _answer(
        self,
        request: Request,
        parse: Callable[[bytes], Asked],
        make_reply: Callable[..., Reply],
    ) -> Answer:
        settings = self._settings
        asked = parse(
            await read_body(
                request, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s
            )
        )
        model = (await self._upstream.ready()).model.name
        if asked.model is not None and asked.model != model:
            raise Refusal(
                404,
                f"model {asked.model[:200]!r} is not served here; {model!r} is",
                code="model_not_found",
                param="model",
            )
        reply = make_reply(model, include_usage=asked.include_usage)
        items = self._upstream.generate(asked.request)
        if asked.is_stream:
            events = _events(items, reply, include_usage=asked.include_usage)
            return EventStream(events, write_timeout_s=settings.write_timeout_s)
        return JsonResponse(await while_connected(request.receive, _whole(items, reply)))


async def _events(
    items: AsyncGenerator[Chunk | Done, None], reply: Reply, *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    is_opened = False
    async with aclosing(items):
        async for item in items:
            if not is_opened:
                is_opened = True
                if (opening := reply.opening()) is not None:
                    yield event(opening)
            if isinstance(item, Chunk):
                # Text lags behind its tokens where a character is not complete yet.
                if item.text or item.logprobs is not None:
                    part = reply.chunk(item.text, logprobs=item.logprobs, finish_reason=None)
                    yield event(part)
                continue
            last = reply.chunk("", logprobs=None, finish_reason=_finish_reason(item))
            yield event(last)
            if include_usage:
                yield event(reply.closing(_usage(item)))
    yield END


async def _whole(items: AsyncGenerator[Chunk | Done, None], reply: Reply) -> dict[str, Any]:
    texts: list[str] = []
    logprobs: list[TokenLogprob] | None = None
    async with aclosing(items):
        async for item in items:
            if isinstance(item, Done):
                return reply.whole(
                    "".join(texts),
                    logprobs=logprobs,
                    finish_reason=_finish_reason(item),
                    usage=_usage(item),
                )
            texts.append(item.text)
            if item.logprobs is not None:
                logprobs = [*(logprobs or ()), *item.logprobs]
    raise Refusal(502, "the server ended the reply without its last message", code="no_end")


def _finish_reason(done: Done) -> str:
    if done.finish_reason == "cancelled":
        raise Refusal(503, "the server cancelled the request", code="cancelled")
    return done.finish_reason


def _usage(done: Done) -> dict[str, Any]:
    usage = done.usage
    return usage_of(usage.prompt_tokens, usage.completion_tokens, cached_tokens=usage.cached_tokens)

"""The ASGI application: its routes, its page, its journal, and the shape of every error.

Knows no socket; `Upstream` is the server, `Access` who is let in.
"""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import log
from .access import Access
from .generation import GenerationEndpoints, Settings
from .keys import ApiKeys
from .live import live_document
from .metrics import CONTENT_TYPE, HttpCounter, render
from .refusal import JsonResponse, Refusal
from .stream import ClientGone
from .upstream import Upstream

_LOG = logging.getLogger("outrider.gateway")
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_MEDIA_TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
# nginx's number for a client that left; never sent, only counted.
CLIENT_GONE = 499


def make_app(
    upstream: Upstream, *, keys: ApiKeys | None = None, settings: Settings | None = None
) -> ASGIApp:
    """The application in front of one server. Without `keys`, only this machine's names are served.

    It closes `upstream` when its lifespan ends.
    """
    generation = GenerationEndpoints(upstream, settings or Settings())
    http = HttpCounter()
    page = _read_page()

    async def health(request: Request) -> Response:
        return JsonResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        stats = await upstream.stats()
        if stats.is_ready:
            return JsonResponse({"status": "ready"})
        raise Refusal(503, f"the server is {stats.state}", code="not_ready", retry_after_s=1)

    async def models(request: Request) -> Response:
        return JsonResponse({"object": "list", "data": [await _model(upstream)]})

    async def model(request: Request) -> Response:
        found = await _model(upstream)
        if request.path_params["name"] != found["id"]:
            name = request.path_params["name"][:200]
            raise Refusal(
                404,
                f"model {name!r} is not served here; {found['id']!r} is",
                code="model_not_found",
                param="model",
            )
        return JsonResponse(found)

    async def metrics(request: Request) -> Response:
        try:
            stats = await upstream.stats()
        except Refusal:
            # A scrape must tell that the server is gone, and cannot if it fails itself.
            stats = None
        return Response(render(stats, http), headers={"content-type": CONTENT_TYPE})

    async def live(request: Request) -> Response:
        return JsonResponse(live_document(await upstream.ready(), await upstream.stats()))

    async def index(request: Request) -> Response:
        return _file(page["index.html"], "index.html")

    async def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in page:
            raise HTTPException(404)
        return _file(page[name], name)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await upstream.close()

    routes = [
        Route("/", index),
        Route("/static/{name}", static),
        Route("/stats", live),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", generation.completions, methods=["POST"]),
        Route("/v1/chat/completions", generation.chat, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={
            Refusal: _refused,
            HTTPException: _http_error,
            ClientGone: _client_gone,
            ClientDisconnect: _client_gone,
            500: _internal_error,
        },
    )
    # A redirect would be made of the Host header.
    app.router.redirect_slashes = False
    paths = frozenset(route.path for route in routes if "{" not in route.path)
    return _Journal(Access(app, keys=keys), http=http, paths=paths)


async def _model(upstream: Upstream) -> dict[str, object]:
    found = (await upstream.ready()).model
    return {
        "id": found.name,
        "object": "model",
        "created": upstream.since,
        "owned_by": "outrider",
        "max_model_len": found.context_tokens,
        "fingerprint": found.fingerprint,
    }


def _read_page() -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (Path(__file__).parent / "page").iterdir()}


def _file(content: bytes, name: str) -> Response:
    media_type = _MEDIA_TYPES[name.rpartition(".")[2]]
    return Response(content, headers=_PAGE_HEADERS, media_type=media_type)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    messages = {
        404: (f"{path!r} is not a path of this gateway", "unknown_url"),
        405: (f"{request.method} is not accepted at {path!r}", "method_not_allowed"),
    }
    message, code = messages.get(error.status_code, (error.detail, "http_error"))
    return Refusal(error.status_code, message, code=code, headers=error.headers).response()


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _internal_error(request: Request, error: Exception) -> Response:
    # The error itself goes to the log: it may hold what another client must not see.
    message = "the gateway failed at this request; its log says how"
    return Refusal(500, message, code="internal").response()


class _Journal:
    """ASGI middleware that counts and logs each answer: who, what, how long; never a body."""

    def __init__(self, app: ASGIApp, *, http: HttpCounter, paths: frozenset[str]) -> None:
        self._app = app
        self._http = http
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status = CLIENT_GONE
        is_complete = False

        async def watched(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                is_complete = True

        try:
            await self._app(scope, receive, watched)
        finally:
            status = status if is_complete else CLIENT_GONE
            route = scope["path"] if scope["path"] in self._paths else "other"
            self._http.count(route, status)
            log.event(
                _LOG,
                logging.INFO,
                "answered",
                method=scope["method"],
                path=scope["path"][:200],
                status=status,
                seconds=round(time.monotonic() - began, 6),
                client=(scope.get("client") or ("",))[0],
            )

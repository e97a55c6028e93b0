"""Replicas of one engine behind Ray Serve: started, watched, replaced; requests go to a free one.

Each replica is a local server process of its own, reached over ipc. Owns the answer to a replica's
death. HTTP is the gateway's; Serve's own proxy is never started.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Self

from ..request import GenerationRequest
from ..serving.client import AsyncClient
from ..serving.conversation import DEFAULT_CREDIT, ConnectionLost, ServerError, checked_frames
from ..serving.messages import Chunk, Done, Error, Generate, Ready, Stats
from .cluster import Cluster
from .engine_process import EngineProcess
from .fleet import Figures

# How often a request is given to another replica when its own died before it said anything.
MAX_ATTEMPTS = 4
_TELL_S = 0.5
_CLIENT_TIMEOUT_S = 20.0
_HEALTH_PERIOD_S = 2.0
_HEALTH_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """What to start, and how many: between `min_replicas` and `max_replicas`, by load.

    `words` and `environment` are the server's, as `EngineProcess` takes them. `max_running` and
    `max_waiting` are requests of one replica.
    """

    words: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    min_replicas: int = 1
    max_replicas: int = 1
    cpus: float = 1
    gpus: float = 0
    max_running: int = 8
    max_waiting: int = 64
    shutdown_timeout_s: float = 30.0


class EngineReplica:
    """What Serve keeps alive: one engine's process, and the client that talks to it."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], figures: Any) -> None:
        self._engine = EngineProcess(words, environment, on_end=_leave)
        self._engine.wait()
        self._client = AsyncClient(self._engine.address, timeout_s=_CLIENT_TIMEOUT_S)
        self._figures = figures
        self._telling: asyncio.Task[None] | None = None

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk | Done | Error]:
        """The engine's messages, a refusal as the last one."""
        try:
            async with aclosing(self._client.generate(request)) as items:
                async for item in items:
                    yield item
        except ServerError as error:
            yield error.error

    async def ready(self) -> Ready:
        """What is served."""
        return await self._client.ready()

    async def check_health(self) -> None:
        """Raises where the engine is silent or has given itself up; Serve then replaces it."""
        if self._telling is None:
            self._telling = asyncio.get_running_loop().create_task(self._tell())
        if (await self._client.ping()).state == "dead":
            raise RuntimeError("the engine has ended")

    async def _tell(self) -> None:
        ray, serve = import_module("ray"), import_module("ray.serve")
        while True:
            with suppress(ConnectionLost):  # the next look at its health says so too
                stats = await self._client.stats()
                try:
                    await self._figures.tell.remote(stats)
                except ray.exceptions.ActorDiedError:
                    # The gateway was killed, and nobody else knows of this application.
                    serve.delete(serve.get_replica_context().app_name, _blocking=False)
                    return
            await asyncio.sleep(_TELL_S)

    def __del__(self) -> None:
        self._engine.close()


class ReplicaClient:
    """The replicas as the gateway sees one server; made by `start_replicas`. One asyncio loop."""

    def __init__(self, ray: Any, handle: Any, figures: Any) -> None:
        self._ray = ray
        self._handle = handle
        self._figures = figures
        self._ready: Ready | None = None

    async def ready(self) -> Ready:
        """What is served; all replicas serve the same, so one answer stands for good."""
        if self._ready is None:
            self._ready = await self._handle.ready.remote()
            assert self._ready is not None
        return self._ready

    async def stats(self) -> Stats:
        """All replicas together. ConnectionLost where none has said anything lately."""
        stats, num_live = await self._figures.all.remote()
        if not num_live:
            raise ConnectionLost("none of the replicas answers")
        return stats

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk | Done, None]:
        """As `AsyncClient.generate`, by whichever replica is free.

        Where its replica dies, a request begins again on another one if nothing had come of it;
        else it ends with ServerError `engine_dead`.
        """
        # Refused here, where it costs no way to a replica.
        checked_frames(Generate.of(request, credit=DEFAULT_CREDIT), b"")
        for attempt in range(1, MAX_ATTEMPTS + 1):
            has_begun = False
            reply = self._handle.options(stream=True).generate.remote(request)
            try:
                async for item in reply:
                    if isinstance(item, Error):
                        raise ServerError(item)
                    has_begun = True
                    yield item
                return
            except self._ray.serve.exceptions.BackPressureError:
                message = "all replicas have as many requests waiting as they take"
                raise _error("overloaded", message, retry_after_ms=1000) from None
            except (self._ray.exceptions.RayError, ConnectionLost) as error:
                if has_begun:
                    message = "the replica that ran this request ended; send it again"
                    raise _error("engine_dead", message) from error
                if attempt == MAX_ATTEMPTS:
                    message = f"{MAX_ATTEMPTS} replicas ended at this request before it began"
                    raise _error("engine_dead", message) from error
            finally:
                # Of a request that is over, this does nothing.
                reply.cancel()

    async def close(self) -> None:
        """Nothing is held open between requests."""


class Replicas:
    """The running application; a context manager that ends it."""

    def __init__(self, ray: Any, name: str, client: ReplicaClient) -> None:
        self._ray = ray
        self._name = name
        self.client = client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.serve.delete(self._name)


def start_replicas(cluster: Cluster, plan: ReplicaPlan) -> Replicas:
    """Start the replicas and block until the least number of them serves. Raises RuntimeError
    of Serve where one cannot start.
    """
    ray, serve = cluster.ray, cluster.serve
    figures = ray.remote(num_cpus=0)(FiguresActor).remote()
    name = f"outrider-{secrets.token_hex(4)}"
    deployment = serve.deployment(
        EngineReplica,
        name="engine",
        max_ongoing_requests=plan.max_running + plan.max_waiting,
        max_queued_requests=plan.max_replicas * plan.max_waiting,
        ray_actor_options={"num_cpus": plan.cpus, "num_gpus": plan.gpus},
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=plan.shutdown_timeout_s,
        **_scaling(plan),
    )
    # No HTTP of Serve's own: the gateway's is stricter, and one door is enough.
    serve.start(proxy_location="Disabled")
    application = deployment.bind(list(plan.words), dict(plan.environment), figures)
    handle = serve.run(application, name=name, route_prefix=None)
    return Replicas(ray, name, ReplicaClient(ray, handle, figures))


class FiguresActor:
    """`Figures` where every replica can reach it; gone with the process that started it."""

    def __init__(self) -> None:
        self._figures = Figures()

    def tell(self, stats: Stats) -> None:
        """As `Figures.tell`."""
        self._figures.tell(stats)

    def all(self) -> tuple[Stats, int]:
        """The sums and how many engines are live."""
        return self._figures.stats(), self._figures.num_live()


def _scaling(plan: ReplicaPlan) -> dict[str, Any]:
    if plan.min_replicas == plan.max_replicas:
        return {"num_replicas": plan.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": plan.min_replicas,
            "max_replicas": plan.max_replicas,
            # More than share a pass would only wait for each other.
            "target_ongoing_requests": plan.max_running,
        }
    }


def _error(code: Any, message: str, *, retry_after_ms: int | None = None) -> ServerError:
    return ServerError(Error(code=code, message=message, retry_after_ms=retry_after_ms))


def _leave(code: int) -> None:
    """Without its engine a replica is nothing: Serve notices a process that is gone at once."""
    os._exit(1)

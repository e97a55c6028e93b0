"""Clients that keep a server busy, and what each of their requests took. Knows no statistics.

A closed loop: every client sends its next request when its last one has ended.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from ..runtime.errors import OutriderError
from ..runtime.request import GenerationRequest
from ..runtime.serving.client import AsyncClient
from ..runtime.serving.messages import Chunk, Stats

_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids and how many tokens to generate after them."""

    name: str
    token_ids: list[int]
    num_tokens: int


@dataclass(slots=True)
class Taken:
    """One request as its client saw it: seconds since it was sent, per CHUNK that held tokens."""

    prompt: Prompt
    times_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    latency_s: float = 0.0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """All requests of one level, the seconds they took together, and the server's counts of it."""

    taken: tuple[Taken, ...]
    duration_s: float
    before: Stats
    after: Stats


async def put_load(address: str, shares: Sequence[Sequence[Prompt]], *, num_idle: int = 0) -> Load:
    """One client a share, all at once; `num_idle` more are connected and say nothing."""
    async with AsyncExitStack() as stack:

        async def connected() -> AsyncClient:
            client = await stack.enter_async_context(AsyncClient(address, timeout_s=_TIMEOUT_S))
            await client.ready()
            return client

        clients = [await connected() for _ in shares]
        for _ in range(num_idle):
            await connected()
        watch = await connected()
        before = await watch.stats()
        began = time.perf_counter()
        taken = await asyncio.gather(
            *(_drive(client, share) for client, share in zip(clients, shares, strict=True))
        )
        duration_s = time.perf_counter() - began
        after = await watch.stats()
    return Load(tuple(one for share in taken for one in share), duration_s, before, after)


async def _drive(client: AsyncClient, prompts: Sequence[Prompt]) -> list[Taken]:
    return [await _take(client, prompt) for prompt in prompts]


async def _take(client: AsyncClient, prompt: Prompt) -> Taken:
    taken = Taken(prompt)
    request = GenerationRequest(
        prompt_token_ids=prompt.token_ids,
        max_tokens=prompt.num_tokens,
        temperature=0.0,
        ignore_eos=True,
        stream=True,
    )
    began = time.perf_counter()
    try:
        async for item in client.generate(request):
            if isinstance(item, Chunk) and item.token_ids:
                taken.times_s.append(time.perf_counter() - began)
                taken.token_ids.extend(item.token_ids)
    except OutriderError as error:
        taken.error = str(error)
    taken.latency_s = time.perf_counter() - began
    return taken

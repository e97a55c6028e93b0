"""A server's client without a server, for tests of what stands in front of it.

It has AsyncClient's methods and errors, answers by a script, and remembers what was asked of it.
Used from two threads: the test's, and that of the event loop which the gateway runs on.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from outrider.runtime.request import GenerationRequest
from outrider.runtime.serving.messages import (
    LIMITS,
    Chunk,
    Done,
    Histogram,
    Limits,
    Model,
    Ready,
    Stats,
    Usage,
)

NUM_LAYERS, NUM_EXPERTS = 3, 8


class Hold:
    """A step of a script that lasts until it is released, or its request is cancelled."""

    def __init__(self) -> None:
        self.is_reached = threading.Event()
        self.is_released = threading.Event()

    async def wait(self) -> None:
        self.is_reached.set()
        while not self.is_released.is_set():
            await asyncio.sleep(0.005)


Step = Chunk | Done | Exception | Hold


def chunk(seq: int, text: str, *, token_ids: Sequence[int] = (7,), logprobs: Any = None) -> Chunk:
    return Chunk(seq=seq, token_ids=tuple(token_ids), text=text, logprobs=logprobs)


def done(num_chunks: int, *, finish_reason: Any = "stop", prompt_tokens: int = 5) -> Done:
    return Done(
        finish_reason=finish_reason,
        usage=Usage(prompt_tokens=prompt_tokens, completion_tokens=num_chunks, cached_tokens=3),
        num_chunks=num_chunks,
        timings={},
        experts={},
    )


def spoken(*texts: str, finish_reason: Any = "stop") -> list[Step]:
    """A script that says `texts`, one chunk each, and ends."""
    chunks: list[Step] = [chunk(seq, text) for seq, text in enumerate(texts)]
    return [*chunks, done(len(texts), finish_reason=finish_reason)]


def make_ready(**changes: Any) -> Ready:
    ready = Ready(
        protocol=1,
        server="outrider 0",
        instance="first",
        is_ready=True,
        state="ready",
        model=Model(
            name="nano",
            fingerprint="f" * 64,
            vocab_size=100,
            context_tokens=512,
            num_moe_layers=NUM_LAYERS,
            num_experts=NUM_EXPERTS,
            top_k=2,
            num_slots=6,
            format="bf16",
            predictor="lookahead",
            has_chat_template=True,
        ),
        limits=Limits(
            message_bytes=int(LIMITS["message_bytes"].maximum),
            request_id_bytes=32,
            credit=64,
            prompt_chars=2**20,
            context_tokens=512,
            requests_running=8,
            requests_waiting=16,
            requests_per_client=64,
        ),
    )
    return msgspec.structs.replace(ready, **changes)


def make_stats(**changes: Any) -> Stats:
    histogram = Histogram(bounds=(0.1, 1.0), counts=(3, 2, 1), sum=2.5, count=6)
    stats = Stats(
        state="ready",
        is_ready=True,
        instance="first",
        uptime_seconds=61.0,
        requests_running=2,
        requests_waiting=1,
        requests_started_total=9,
        requests_total={"stop": 3, "length": 2, "cancelled": 1},
        prompt_tokens_total=100,
        prompt_tokens_cached_total=60,
        generation_tokens_total=200,
        time_to_first_token_seconds=histogram,
        inter_token_latency_seconds=histogram,
        e2e_request_latency_seconds=histogram,
        expert_lookups_total={"hit": 70, "late": 10, "miss": 20},
        expert_prefetch_total={"used": 5, "wasted": 4, "cancelled": 3},
        expert_transfer_bytes_total={"on_demand": 1000, "prefetch": 500},
        expert_stall_seconds_total=1.5,
        expert_cache_bytes=4096,
        degraded=False,
        errors_total={},
        rejected_total={},
        connections_total={"accepted": 1},
        num_moe_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        residency=bytes([0, 1, 2, 3] * (NUM_LAYERS * NUM_EXPERTS // 4)),
    )
    return msgspec.structs.replace(stats, **changes)


@dataclass
class ScriptedClient:
    """`script` makes the steps of one answer from its request; `failure` fails everything."""

    script: Callable[[GenerationRequest], Sequence[Step]] = lambda request: spoken("Hello", " you")
    failure: Exception | None = None
    ready_answer: Ready = field(default_factory=make_ready)
    stats_answers: Callable[[int], Stats] = lambda count: make_stats()
    requests: list[GenerationRequest] = field(default_factory=list)
    num_stats: int = 0
    is_closed: bool = False
    was_cancelled: threading.Event = field(default_factory=threading.Event)

    async def ready(self) -> Ready:
        self._check()
        return self.ready_answer

    async def stats(self) -> Stats:
        self._check()
        self.num_stats += 1
        return self.stats_answers(self.num_stats)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk | Done, None]:
        self._check()
        self.requests.append(request)
        has_ended = False
        try:
            for step in self.script(request):
                if isinstance(step, Hold):
                    await step.wait()
                elif isinstance(step, Exception):
                    has_ended = True
                    raise step
                else:
                    has_ended = isinstance(step, Done)
                    yield step
                    await asyncio.sleep(0)
        finally:
            if not has_ended:
                self.was_cancelled.set()

    async def close(self) -> None:
        self.is_closed = True

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

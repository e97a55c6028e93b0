"""Counts and times of a server, and how the STATS message says them. Knows no socket."""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass

from .backend import ExpertTotals
from .messages import Histogram, Model, ServerState, Stats

# Upper bounds in seconds: from a small model's token to a long prompt of an offloaded one.
LATENCY_BOUNDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0,
    100.0, 250.0,
)  # fmt: skip


class Observations:
    """A histogram that is being filled; one thread."""

    def __init__(self, bounds: tuple[float, ...] = LATENCY_BOUNDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def histogram(self) -> Histogram:
        """As it stands now."""
        counts = tuple(self._counts)
        return Histogram(bounds=self._bounds, counts=counts, sum=self._sum, count=sum(counts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What the engine's thread has counted by the end of a pass."""

    num_running: int
    prompt_tokens: int
    prompt_tokens_cached: int
    generation_tokens: int
    time_to_first_token: Histogram
    inter_token_latency: Histogram
    e2e_latency: Histogram
    experts: ExpertTotals


class Timings:
    """Tokens and latencies of all requests; filled by the engine's thread."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.prompt_tokens_cached = 0
        self.generation_tokens = 0
        self.time_to_first_token = Observations()
        self.inter_token_latency = Observations()
        self.e2e_latency = Observations()

    def snapshot(self, *, num_running: int, experts: ExpertTotals) -> Snapshot:
        """The value that leaves the thread."""
        return Snapshot(
            num_running=num_running,
            prompt_tokens=self.prompt_tokens,
            prompt_tokens_cached=self.prompt_tokens_cached,
            generation_tokens=self.generation_tokens,
            time_to_first_token=self.time_to_first_token.histogram(),
            inter_token_latency=self.inter_token_latency.histogram(),
            e2e_latency=self.e2e_latency.histogram(),
            experts=experts,
        )


class Counters:
    """What the socket's thread counts: requests by their end, errors, refusals, connections."""

    def __init__(self) -> None:
        self.started = 0
        self.finished = Counter(stop=0, length=0, cancelled=0, error=0)
        self.errors = Counter[str](client_gone=0)
        self.rejected = Counter[str]()
        self.connections = Counter[str]()

    def stats(
        self,
        snapshot: Snapshot,
        *,
        num_open: int,
        state: ServerState,
        model: Model,
        instance: str,
        uptime_s: float,
    ) -> Stats:
        """The message; `num_open` requests have begun and not ended."""
        running = min(snapshot.num_running, num_open)
        experts = snapshot.experts
        return Stats(
            state=state,
            is_ready=state == "ready",
            instance=instance,
            uptime_seconds=uptime_s,
            requests_running=running,
            requests_waiting=num_open - running,
            requests_started_total=self.started,
            requests_total=dict(self.finished),
            prompt_tokens_total=snapshot.prompt_tokens,
            prompt_tokens_cached_total=snapshot.prompt_tokens_cached,
            generation_tokens_total=snapshot.generation_tokens,
            time_to_first_token_seconds=snapshot.time_to_first_token,
            inter_token_latency_seconds=snapshot.inter_token_latency,
            e2e_request_latency_seconds=snapshot.e2e_latency,
            expert_lookups_total=dict(experts.lookups),
            expert_prefetch_total=dict(experts.prefetch),
            expert_transfer_bytes_total=dict(experts.transfer_bytes),
            expert_stall_seconds_total=experts.stall_s,
            expert_cache_bytes=experts.cache_bytes,
            degraded=experts.is_degraded,
            errors_total=dict(self.errors),
            rejected_total=dict(self.rejected),
            connections_total=dict(self.connections),
            num_moe_layers=model.num_moe_layers,
            num_experts=model.num_experts,
            residency=experts.residency,
        )

"""Counts and times of a generation, with the JSON names users see.

Plain values: knows neither cache nor clock; whoever acts, counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Literal


@dataclass(slots=True)
class ExpertTraffic:
    """How expert look-ups were served, and what prefetching cost.

    One look-up is one distinct (step, MoE layer, expert). A late hit was asked for while its
    prefetch was still under way. `host_computed` counts the misses computed on the host instead of
    fetched. The four counts `prefetch_issued` to `prefetch_cancelled` speak of transfers, not of
    look-ups. `prefetch_used_next` counts look-ups, hits and late ones, served by a prefetch that
    was issued in the token before: since experts are of one size, that horizon's share of the
    stall that is hidden.
    """

    lookups: int = 0
    hits_resident: int = 0
    hits_prefetched: int = 0
    late_hits: int = 0
    misses: int = 0
    host_computed: int = 0
    prefetch_issued: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0
    prefetch_cancelled: int = 0
    bytes_on_demand: int = 0
    bytes_prefetched: int = 0
    prefetch_used_next: int = 0

    @property
    def hit_rate(self) -> float | None:
        """(resident + prefetched hits) / look-ups, late hits not among them; None without any."""
        if not self.lookups:
            return None
        return (self.hits_resident + self.hits_prefetched) / self.lookups

    def add(self, other: "ExpertTraffic") -> None:
        """Add another traffic's counts to this one's, in place."""
        for name in _TRAFFIC_NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __add__(self, other: "ExpertTraffic") -> "ExpertTraffic":
        total = ExpertTraffic()
        total.add(self)
        total.add(other)
        return total

    @classmethod
    def merge(cls, parts: Iterable["ExpertTraffic"]) -> "ExpertTraffic":
        """The sum of any number of traffics."""
        total = cls()
        for part in parts:
            total.add(part)
        return total

    def check(self) -> None:
        """Raise `AssertionError`, naming the counts, if they cannot all be true.

        A prefetch may be issued in one phase and used in the next, so those counts are compared by
        the cache, which sees both (`ExpertCache.check`).
        """
        for name in _TRAFFIC_NAMES:
            if getattr(self, name) < 0:
                raise AssertionError(f"{name} is {getattr(self, name)}")
        served = self.hits_resident + self.hits_prefetched + self.late_hits + self.misses
        if self.lookups != served:
            raise AssertionError(
                f"{self.lookups} look-ups, but {self.hits_resident} resident + "
                f"{self.hits_prefetched} prefetched + {self.late_hits} late + {self.misses} misses"
                f" = {served}"
            )
        if self.host_computed > self.misses:
            raise AssertionError(f"{self.host_computed} host computed of {self.misses} misses")

    def as_dict(self) -> dict[str, int]:
        """The TRAFFIC object, in its documented order."""
        return {name: getattr(self, name) for name in _TRAFFIC_NAMES}


_TRAFFIC_NAMES = tuple(item.name for item in fields(ExpertTraffic))


@dataclass(slots=True)
class StepStats:
    """One forward pass: phase, tokens, wall seconds, seconds stalled on experts, traffic."""

    phase: Literal["prefill", "decode"]
    num_tokens: int
    wall_s: float
    stall_s: float = 0.0
    traffic: ExpertTraffic = field(default_factory=ExpertTraffic)

    def as_dict(self) -> dict[str, object]:
        """The step as JSON, traffic nested."""
        return {
            "phase": self.phase,
            "num_tokens": self.num_tokens,
            "wall_s": self.wall_s,
            "stall_s": self.stall_s,
            "traffic": self.traffic.as_dict(),
        }


@dataclass(slots=True)
class GenerationTimings:
    """Seconds and tokens of one generation; the rates are derived, never stored.

    `decode_tokens` counts the tokens that decode steps yielded: the first token comes from prefill
    and belongs to `ttft_s`. `stall_s` is the time compute waited for experts, over both phases.
    """

    load_s: float = 0.0
    ttft_s: float = 0.0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    stall_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens per second; None before a prefill has taken any time."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s > 0 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens per second after the first one; None where no decode step has run."""
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else None

    def add(self, other: "GenerationTimings") -> None:
        """Add another sequence's times and tokens in place, as if run one after the other.

        The model was loaded once, so `load_s` is the larger one; `ttft_s` stays this one's unless
        it has had no first token yet.
        """
        self.load_s = max(self.load_s, other.load_s)
        self.ttft_s = self.ttft_s or other.ttft_s
        self.prefill_tokens += other.prefill_tokens
        self.prefill_s += other.prefill_s
        self.decode_tokens += other.decode_tokens
        self.decode_s += other.decode_s
        self.stall_s += other.stall_s

    def as_dict(self) -> dict[str, float | None]:
        """The "timings" object of `generate --json`."""
        return {
            "load_s": self.load_s,
            "ttft_s": self.ttft_s,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "stall_s": self.stall_s,
        }


@dataclass(slots=True)
class ExpertUsage:
    """The expert memory of a run, in experts and bytes, with the traffic of both phases."""

    total: int
    slots: int
    budget_bytes: int
    slot_bytes: int
    decode: ExpertTraffic = field(default_factory=ExpertTraffic)
    prefill: ExpertTraffic = field(default_factory=ExpertTraffic)

    def as_dict(self) -> dict[str, object]:
        """The "experts" object of `generate --json`."""
        return {
            "total": self.total,
            "slots": self.slots,
            "budget_bytes": self.budget_bytes,
            "slot_bytes": self.slot_bytes,
            "decode": self.decode.as_dict(),
            "prefill": self.prefill.as_dict(),
        }


@dataclass(slots=True)
class GenerationStats:
    """What one generation took: the value that steps are recorded into."""

    timings: GenerationTimings
    experts: ExpertUsage

    def record(self, step: StepStats) -> None:
        """Count one step into its phase's traffic, tokens and seconds."""
        if step.phase == "prefill":
            self.timings.prefill_tokens += step.num_tokens
            self.timings.prefill_s += step.wall_s
            self.experts.prefill.add(step.traffic)
        else:
            self.timings.decode_tokens += step.num_tokens
            self.timings.decode_s += step.wall_s
            self.experts.decode.add(step.traffic)
        self.timings.stall_s += step.stall_s

    def as_dict(self) -> dict[str, object]:
        """The "timings" and "experts" objects of `generate --json`."""
        return {"timings": self.timings.as_dict(), "experts": self.experts.as_dict()}
